"""Print the commands of a Markdown file: the lines of its ```sh blocks."""

import re
import sys
from pathlib import Path

for block in re.findall(r"^```sh\n(.*?)^```", Path(sys.argv[1]).read_text(), flags=re.MULTILINE | re.DOTALL):
    print(block, end="")
