"""train/main.py, but one rank dies or fails when it begins its third step; run under torchrun.

HOW in the environment says what befalls rank 1: kill, stop (it stands still) or raise.
"""

import os
import signal

from bioinstruct.train import main, trainer
from bioinstruct.train.ranks import watch
from bioinstruct.train.step import StepResult, train_step

watch.SILENCE_S, watch.TROUBLED_SILENCE_S, watch.GRACE_S = 8.0, 3.0, 2.0
calls = 0


def dying_step(*arguments: object) -> StepResult:
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        if os.environ["HOW"] == "raise":
            raise ValueError("nothing more to learn")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[os.environ["HOW"]])
    return train_step(*arguments)  # type: ignore[arg-type]


trainer.train_step = dying_step
main.main()
