"""A reward for `allyouneed finetune --method ppo|rejection`: how well instructions that can be checked were met.

Run as a program it writes their prompts:

    python docs/examples/checked.py > prompts.jsonl
"""

import json

from allyouneed.data.checkable import Checks, tasks

TASKS = tasks(192, seed=0)

rewards = Checks(TASKS)

if __name__ == "__main__":
    for task in TASKS:
        print(json.dumps({"prompt": [{"role": "user", "content": task.prompt}]}))
