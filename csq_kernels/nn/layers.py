"""The CSQ layers: static, importable, picklable subclasses of the ``nn`` layers that they replace."""

from torch import nn

from csq_kernels.nn.layer import CSQLayer


class CSQLinear(CSQLayer, nn.Linear):
    """``nn.Linear`` whose weight is learnt bit by bit, equation (3); options as in ``Config``.

    Example:
        >>> import torch
        >>> layer = CSQLinear(8, 4, n_bits=6)
        >>> layer(torch.zeros(2, 8)).shape
        torch.Size([2, 4])
        >>> layer.bit_logits.shape
        torch.Size([2, 6, 4, 8])
    """

    float_class = nn.Linear


class CSQConv1d(CSQLayer, nn.Conv1d):
    """``nn.Conv1d`` whose weight is learnt bit by bit, equation (3); options as in ``Config``."""

    float_class = nn.Conv1d


class CSQConv2d(CSQLayer, nn.Conv2d):
    """``nn.Conv2d`` whose weight is learnt bit by bit, equation (3); options as in ``Config``."""

    float_class = nn.Conv2d


class CSQConv3d(CSQLayer, nn.Conv3d):
    """``nn.Conv3d`` whose weight is learnt bit by bit, equation (3); options as in ``Config``."""

    float_class = nn.Conv3d


class CSQConvTranspose2d(CSQLayer, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` whose weight is learnt bit by bit, equation (3); its channels are axis 1 of the weight."""

    float_class = nn.ConvTranspose2d
    channel_axis = 1


class CSQEmbedding(CSQLayer, nn.Embedding):
    """``nn.Embedding`` whose table is learnt bit by bit, equation (3); its channels are the rows of the table.

    Raises:
        ValueError: ``max_norm`` or ``sparse`` is set: both change or update the table in place.
    """

    float_class = nn.Embedding
    quantizes_input = False

    @staticmethod
    def check_convertible(layer: nn.Module) -> None:
        if layer.max_norm is not None:
            raise ValueError(f"expected max_norm None for a CSQ embedding, got {layer.max_norm}")
        if layer.sparse:
            raise ValueError("expected sparse False for a CSQ embedding, got True")

    @classmethod
    def from_pretrained(cls, embeddings, freeze=True, padding_idx=None, **options):
        """As ``nn.Embedding.from_pretrained``, with the options of ``Config``."""
        return cls.from_float(nn.Embedding.from_pretrained(embeddings, freeze, padding_idx), **options)


CSQ_CLASSES: dict[type[nn.Module], type[CSQLayer]] = {
    cls.float_class: cls for cls in (CSQLinear, CSQConv1d, CSQConv2d, CSQConv3d, CSQConvTranspose2d, CSQEmbedding)
}
