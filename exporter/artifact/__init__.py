"""The directory that is written: staging, and the check at the end of an export."""
