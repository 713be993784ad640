"""Run cases on fake tensors; say what is wrong, as JSON on stdout.

    python -m tests.fake_cuda               # the short suite's cases
    python -m tests.fake_cuda MODEL …       # every option of these models
    python -m tests.fake_cuda --defects     # in addition: what is said of each defect
    python -m tests.fake_cuda --write       # a new table.json; read its diff before it is kept

What is seen so, and what isn't, says `tests/fake_cuda/test_fake_cuda.py`.
"""

from tests.fake_cuda.load import load

load()  # before torch is imported

import argparse  # noqa: E402
import json  # noqa: E402
import warnings  # noqa: E402

from tests.fake_cuda.cases import MODELS, cases, run_case, short_cases  # noqa: E402
from tests.fake_cuda.defects import DEFECTS  # noqa: E402
from tests.fake_cuda.verdict import TABLE, complaints, numbers_of, table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--defects", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    if given.write:
        numbers = {case.name: numbers_of(run_case(case)) for case in cases(MODELS)}
        TABLE.write_text(json.dumps(numbers, indent=1) + "\n")
        return
    expected = table()
    said = {
        case.name: complaints(case, run_case(case), expected.get(case.name, {}))
        for case in (cases(given.models) if given.models else short_cases())
    }
    for name, defect in DEFECTS.items() if given.defects else ():
        with defect.patch():
            found = run_case(defect.case)
        said[name] = complaints(defect.case, found, expected[defect.case.name])
    print(json.dumps(said, indent=1))


main()
