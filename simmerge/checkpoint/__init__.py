"""A checkpoint is a folder in the Hugging Face layout (config, tokenizer, safetensors weights), or an adapter on one.

Opening one reads headers only and trusts nothing in them. `TensorReader`, which needs torch, is imported
from `simmerge.checkpoint.reader`; everything named here works without torch.
"""

from simmerge.checkpoint.adapter import open_adapter
from simmerge.checkpoint.checkpoint import Checkpoint, open_checkpoint, tokenizer_digest, weights_digest
from simmerge.checkpoint.compatibility import problems, require_compatible
from simmerge.checkpoint.header import FileHeader, TensorInfo, read_header
from simmerge.checkpoint.lineage import Lineage, lineage

__all__ = [
    "Checkpoint",
    "FileHeader",
    "Lineage",
    "TensorInfo",
    "lineage",
    "open_adapter",
    "open_checkpoint",
    "problems",
    "read_header",
    "require_compatible",
    "tokenizer_digest",
    "weights_digest",
]
