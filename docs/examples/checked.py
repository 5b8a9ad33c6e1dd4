"""A reward for `allyouneed finetune --method ppo|rejection`: how well instructions that can be checked were met.

Run as a program it writes their prompts; with `held out`, other ones to judge by:

    python docs/examples/checked.py > prompts.jsonl
    python docs/examples/checked.py held out > held.jsonl
"""

import json
import sys

from allyouneed.data.checkable import Checks, tasks

LEARNED, HELD_OUT = tasks(192, seed=0), tasks(96, seed=0, held_out=True)

rewards = Checks([*LEARNED, *HELD_OUT])

if __name__ == "__main__":
    for task in HELD_OUT if sys.argv[1:] == ["held", "out"] else LEARNED:
        print(json.dumps({"prompt": [{"role": "user", "content": task.prompt}]}))
