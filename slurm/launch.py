"""`accelerate launch` that ends with the exit code of the process that failed first; its own is always 1."""

from __future__ import annotations

import subprocess
import sys

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

try:
    main()
except ChildFailedError as error:
    _, first = error.get_first_failure()
    code = first.exitcode
except SignalException as error:  # its processes have been asked to end, and waited for
    code = -error.sigval
except subprocess.CalledProcessError as error:  # one process on one machine
    code = error.returncode
else:
    code = 0
sys.exit(code if code >= 0 else 128 - code)  # as shells say it
