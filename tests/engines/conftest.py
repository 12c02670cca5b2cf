"""The tests in this folder run an engine that has an environment of its own: `make test-engines`."""

import os

collect_ignore_glob = [] if os.environ.get("FORETOKEN_VLLM_PYTHON") else ["test_*.py"]
