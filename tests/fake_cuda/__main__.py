"""Run cases; what they show as JSON, on stdout.

    python -m tests.fake_cuda [CASE …]     # "model: option"; without: all
    python -m tests.fake_cuda --write      # a new table.json of all
"""

from tests.fake_cuda.load import load

load()  # before torch is imported

import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

from tests.fake_cuda.cases import cases, run_case  # noqa: E402

for model, option in cases():
    if len(sys.argv) > 1 and f"{model}: {option}" not in sys.argv[1:]:
        continue
    t = time.process_time()
    found = run_case(model, option)
    print(model, option, round(time.process_time() - t, 2), json.dumps(found.plain(), indent=1), flush=True)
