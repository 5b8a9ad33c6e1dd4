"""Ask whatever serves OpenAI's interface, through the official client (pip install openai).

python client.py [URL]        # without: http://127.0.0.1:8000/v1, where `allyouneed serve` listens
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="not needed here")
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]

whole = client.chat.completions.create(model=model, messages=messages, max_tokens=40, temperature=0)
print(f"{model}: {whole.choices[0].message.content}  ({whole.usage.completion_tokens} tokens)")

usage = {"include_usage": True}
for chunk in client.chat.completions.create(
    model=model, messages=messages, max_tokens=40, temperature=0, stream=True, stream_options=usage
):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n{chunk.usage.total_tokens} tokens with the question")
