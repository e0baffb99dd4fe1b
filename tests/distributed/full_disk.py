"""Worker of test_failures: the command line, on a disk that is full when the second process saves a second time."""

from __future__ import annotations

import errno
import os
from typing import Any

from megafish.cli import main
from megafish.train import saver

written = 0
write = saver.write_pieces


def write_or_fail(*arguments: Any) -> dict[str, Any]:
    global written
    written += 1
    if os.environ["RANK"] == "1" and written == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(*arguments)


if __name__ == "__main__":
    saver.write_pieces = write_or_fail
    main()
