"""Whether a model keeps the documents of a row apart.

transformers' attention does, from position ids that restart, when it gets no attention_mask and no cache: true for
LLaMA, Qwen, Gemma, Mistral, GPT-2 and most others. Not for models without position ids (OPT, BLOOM, MPT) or with a
state that runs along the row (Mamba, RWKV, RecurrentGemma). So a model is asked, not looked up.
"""

import torch
from torch import Tensor, nn

from trainer.data.config import Packing
from trainer.errors import UserError

FIRST, SECOND = 7, 5
"""Tokens of the two documents of the probe; uneven, so that no chunk border falls between them."""
LARGEST_SHARE = 1e-3
"""Change of the second document's logits beside the first's. A leak gives 0.01 to 1; none gives exactly 0 on CPU."""


@torch.no_grad()
def documents_leak(model: nn.Module, vocab_size: int) -> bool:
    """Whether changing the first document of a row changes the logits of the second.

    Two forward passes of 2 x 12 tokens; the model's mode and the random state are left as they were.
    """
    device = next(model.parameters()).device
    ids = torch.arange(2 * (FIRST + SECOND)).reshape(2, -1) % vocab_size
    other = ids.clone()
    other[:, :FIRST] = (ids[:, :FIRST] + vocab_size // 2) % vocab_size
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).expand(2, -1)
    was_training = model.training
    model.eval()
    try:
        before, after = (logits_of(model, rows.to(device), positions.to(device)) for rows in (ids, other))
    finally:
        model.train(was_training)
    change = (after - before).abs()
    return bool(change[:, FIRST:].max() > LARGEST_SHARE * change[:, :FIRST].max())


def logits_of(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Call a model as the training step does."""
    logits: Tensor = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return logits.float()


def check_documents_apart(model: nn.Module, vocab_size: int, packing: Packing) -> None:
    """Refuse to pack documents for a model that would mix them; one document a row cannot leak.

    Raises:
        UserError: with the packing to use instead.
    """
    if packing is not Packing.document and documents_leak(model, vocab_size):
        raise UserError(
            f"data.packing={packing.value}: {type(model).__name__} lets a document of a row see the ones before it "
            "(it takes no notice of position ids). Use data.packing=document."
        )
