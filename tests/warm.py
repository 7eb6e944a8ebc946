"""What the server of `forked.py` imports before it is asked for a process, so that none of these has to."""

import gc

import torch.distributed.fsdp
import torch.nn.parallel
import transformers.models.bert.modeling_bert
import transformers.models.clip.modeling_clip
import transformers.models.llava.modeling_llava
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

import glue_moefy  # noqa: F401
import stgc_hf  # noqa: F401
import toy_lvlm  # noqa: F401

gc.collect()
gc.freeze()  # as in conftest.py
