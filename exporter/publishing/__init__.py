"""What of an artifact is published on the Hugging Face Hub, and the one commit that does it."""
