"""Python imports this by itself where the folder is on PYTHONPATH: so every process has the same stopwatch."""

import os

if "STOPWATCH" in os.environ:
    import stopwatch

    stopwatch.wait_for_torch()
