"""Files of prompts: their lines, and the output that grows."""
