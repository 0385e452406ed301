"""What only a person at a terminal sees: panels, line editing, chat."""
