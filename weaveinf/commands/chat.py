"""`weaveinf chat`: a conversation in the terminal."""

import argparse
import sys

from weaveinf.cli import settings
from weaveinf.commands.generate import sampling
from weaveinf.llm import LLM


def run(args: argparse.Namespace) -> None:
    params = sampling(args)
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(system)
    with LLM(**settings(args)) as llm:
        # Says at once, not after the first question, that a model cannot chat.
        llm.engine.render_chat([*system, {"role": "user", "content": "Hello"}])
        print("Ask; an empty line forgets the conversation, Ctrl-D ends it.", file=sys.stderr)
        while (question := _ask()) is not None:
            if not question:
                messages = list(system)
                continue
            messages.append({"role": "user", "content": question})
            answer = ""
            try:
                for text in llm.chat(messages, params):
                    answer += text
                    print(text, end="", flush=True)
            except KeyboardInterrupt:
                pass  # ends the answer, not the conversation
            except ValueError as error:
                print(f"weaveinf: {error}", file=sys.stderr)
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
