"""Pictures of a layout."""
