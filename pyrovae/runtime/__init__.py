"""What everything needs and nobody should see: files that are whole or not there, locks, random states."""
