"""Messages from a runner to the benchmark: one JSON object a line. Plain Python, for every environment."""

import json
import time
from typing import Any


def tell(event: str, **facts: Any) -> None:
    """`begin`: imports are done and the tokenizer is loaded. `ready`: every token and mask is there."""
    print(json.dumps({"event": event, "at": time.monotonic(), **facts}), flush=True)
