"""Run the Python code of a page in one namespace: what a user with the declared dependencies alone can do."""

import pathlib
import re
import sys

namespace: dict[str, object] = {}
for block in re.findall(r"^```python\n(.*?)^```", pathlib.Path(sys.argv[1]).read_text(), flags=re.M | re.S):
    exec(compile(block, sys.argv[1], "exec"), namespace)
