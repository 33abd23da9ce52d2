"""Two turns about an image as an SGLang frontend program, against a running server.

    python scripts/eval/frontend_chat.py --base-url http://127.0.0.1:30000 [--image FILE]

SGLang picks the chat template from the model's path, so a local model directory must be named after
its model (`qwen...vl`, `llava`). Prints the answers and, per turn, the prompt tokens and how many
of them were cached. SGLang's frontend sends no headers of ours, so behind the router of
serve_many.sh the turns may meet different servers: give the URL of one of them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import requests
import sglang as sgl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from pictures import picture


# SGLang wants the first argument to be named `s`.
@sgl.function
def chat_about_image(s, image_path: str, max_tokens: int):
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user(sgl.image(image_path) + "What is in this picture?")
    s += sgl.assistant(sgl.gen("first_answer", max_tokens=max_tokens, temperature=0))
    s += sgl.user("Which colour is the largest shape?")
    s += sgl.assistant(sgl.gen("second_answer", max_tokens=max_tokens, temperature=0))


def connect(base_url: str) -> sgl.RuntimeEndpoint:
    try:
        return sgl.RuntimeEndpoint(base_url)
    except (requests.RequestException, OSError, AssertionError, RuntimeError) as error:
        sys.exit(
            f"error: no SGLang server at {base_url} ({error}); start one with scripts/serve.sh"
        )


def run_chat(backend: sgl.RuntimeEndpoint, image_path: Path, max_tokens: int) -> None:
    state = chat_about_image.run(image_path=str(image_path), max_tokens=max_tokens, backend=backend)
    if error := state.error():
        sys.exit(f"error: the program failed: {error}")
    for turn, name in enumerate(("first_answer", "second_answer"), start=1):
        usage = state.get_meta_info(name)
        print(
            f"turn {turn}: prompt tokens {usage['prompt_tokens']}, cached tokens "
            f"{usage['cached_tokens']}"
        )
        print(f"  {state[name].strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:30000", help="(default %(default)s)"
    )
    parser.add_argument(
        "--image", type=Path, help="image file (default: a picture drawn from --seed)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the drawn picture (default %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=32, help="of one answer (default %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.image and not arguments.image.is_file():
        parser.error(f"--image {arguments.image} is not a file")

    backend = connect(arguments.base_url.rstrip("/"))
    if arguments.image:
        run_chat(backend, arguments.image, arguments.max_tokens)
        return
    with tempfile.TemporaryDirectory() as directory:
        drawn = Path(directory) / "picture.png"
        picture(arguments.seed, (448, 448)).save(drawn)
        run_chat(backend, drawn, arguments.max_tokens)


if __name__ == "__main__":
    main()
