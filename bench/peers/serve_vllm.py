"""Becomes vLLM's own OpenAI-compatible server on CPUs, in the environment of time_vllm.py.

bench/.venvs/vllm/bin/python bench/peers/serve_vllm.py MODEL --tp 2 --port 8001
"""

from __future__ import annotations

import argparse
import os
import sys

from time_vllm import settle_environment


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model with vLLM.")
    parser.add_argument("model", help="directory of a Hugging Face checkpoint")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1")
    args = parser.parse_args()
    settle_environment(args.tp)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    command += ["--tensor-parallel-size", str(args.tp), "--distributed-executor-backend", "mp"]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", str(args.port)])


if __name__ == "__main__":
    main()
