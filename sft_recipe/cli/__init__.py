"""What people type: one module for each script, and the flags that they share."""
