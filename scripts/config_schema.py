#!/usr/bin/env python3
"""Prints the JSON schema of config.yaml, which editors find in conf/config.schema.json: scripts/config_schema.py"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft_recipe.errors import packages_required

with packages_required():
    from sft_recipe.config.json_schema import config_schema

print(json.dumps(config_schema(), indent=2, ensure_ascii=False))
