"""What several commands share: options, errors, reports."""
