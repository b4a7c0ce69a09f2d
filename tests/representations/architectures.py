"""Real architectures, small: what the conformance of representations runs over."""

from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Built = tuple[nn.Module, Any]
"""A network and its example inputs."""


def images(size: int = 32, channels: int = 3) -> tuple[Tensor]:
    return (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def words(length: int = 9) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 99, (2, length), generator=torch.Generator().manual_seed(0))}


class Residual(nn.Module):
    """Two convolutional blocks around a residual stream, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first in (0, 2):
            y = self.norms[first](self.convs[first](x)).relu()
            x = (x + self.norms[first + 1](self.convs[first + 1](y))).relu()
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all before it, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 + 6 * i, 6, 3, padding=1) for i in range(3))
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(22, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(x).mean((2, 3))


class Gated(nn.Module):
    """A gated MLP whose two halves lie in one matrix, and a tied table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 20), nn.Linear(10, 6)
        self.norm, self.head = nn.RMSNorm(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return self.head(x + self.down(torch.nn.functional.silu(gate) * value))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body = kind(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.1)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Mixture(nn.Module):
    """Experts that a value-dependent choice picks."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        return torch.stack([self.experts[int(i)](row) for i, row in zip(chosen, x, strict=True)])


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> Callable[[], Built]:
    def build() -> Built:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
        return nn.Sequential(*layers[:-1]), torch.randn(3, widths[0])

    return build


TORCH: dict[str, Callable[[], Built]] = {
    "mlp": mlp(5, 7, 6, 3),
    "mlp tanh": mlp(5, 7, 6, 3, activation=nn.Tanh),
    "mlp gelu": mlp(5, 7, 6, 3, activation=nn.GELU),
    "convnet": lambda: (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 4)), images(8)
    ),
    "depthwise and groups": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4),
            nn.GroupNorm(2, 12), nn.Conv2d(12, 2, 1),
        ), images(8),
    ),
    "transposed": lambda: (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(4, 2, 1)), images(8)
    ),
    "weight norm": lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 2)), torch.randn(3, 5)
    ),
    "prelu": lambda: (nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 2)), torch.randn(3, 5)),
    "residual": lambda: (Residual(), images(8)),
    "dense": lambda: (Dense(), images(8)),
    "gated": lambda: (Gated(), torch.arange(8).reshape(2, 4)),
    "lstm": lambda: (Recurrent(nn.LSTM), torch.randn(2, 4, 5)),
    "gru": lambda: (Recurrent(nn.GRU), torch.randn(2, 4, 5)),
    "attention": lambda: (Attention(), torch.randn(2, 5, 12)),
    "mixture": lambda: (Mixture(), torch.randn(40, 6)),
}  # fmt: skip

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
}  # fmt: skip
VISION = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}


def language(
    name: str, inputs: Callable[[], Any] = words, suffix: str = "Model", **settings: Any
) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        config = getattr(transformers, f"{name}Config")(**(settings or SMALL))
        return getattr(transformers, f"{name}{suffix}")(config), inputs()

    return build


def both() -> dict[str, Tensor]:
    return {**words(), "decoder_input_ids": words(5)["input_ids"]}


TRANSFORMERS: dict[str, Callable[[], Built]] = {
    "bert": language("Bert", suffix="ForSequenceClassification"),
    "albert": language("Albert", **SMALL, embedding_size=16, suffix="ForMaskedLM"),
    "distilbert": language("DistilBert", suffix="ForMaskedLM", vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "gpt2": language("GPT2", suffix="LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=32,
                     bos_token_id=1, eos_token_id=1),
    "opt": language("OPT", suffix="ForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                    vocab_size=99, word_embed_proj_dim=32),
    "llama": language("Llama", suffix="ForCausalLM", **SMALL, num_key_value_heads=2),
    "gemma": language("Gemma", suffix="ForCausalLM", **SMALL, num_key_value_heads=2, head_dim=8),
    "neox": language("GPTNeoX", suffix="ForCausalLM"),
    "t5": language("T5", both, suffix="ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                   vocab_size=99),
    "bart": language("Bart", both, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=99),
    "mamba": language("Mamba", suffix="ForCausalLM", hidden_size=32, num_hidden_layers=2, vocab_size=99),
    "fnet": language("FNet", suffix="ForMaskedLM", hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=99),
    "vit": language("ViT", lambda: images(16), suffix="ForImageClassification", **VISION),
    "clip": language("CLIPVision", lambda: images(16), **VISION),
}  # fmt: skip


def graph_network(name: str, **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        import torch_geometric.nn as pyg

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                layer, heads = getattr(pyg, name), settings.get("heads", 1)
                self.first = layer(6, 8, **settings)
                self.second = layer(8 * heads, 3, **{**settings, **({"heads": 1} if heads > 1 else {})})

            def forward(self, x: Tensor, edges: Tensor) -> Tensor:
                return self.second(self.first(x, edges).relu(), edges)

        generator = torch.Generator().manual_seed(0)
        return Network(), (torch.randn(12, 6), torch.randint(0, 12, (2, 30), generator=generator))

    return build


GEOMETRIC: dict[str, Callable[[], Built]] = {
    "gcn": graph_network("GCNConv"),
    "sage": graph_network("SAGEConv"),
    "gat": graph_network("GATConv", heads=2),
    "gatv2": graph_network("GATv2Conv", heads=2),
    "transformer": graph_network("TransformerConv", heads=2),
    "tag": graph_network("TAGConv"),
    "cheb": graph_network("ChebConv", K=3),
    "arma": graph_network("ARMAConv", num_layers=2),
}


def diffuser(name: str, inputs: Callable[[], Any], **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        import diffusers

        return getattr(diffusers, name)(**settings), inputs()

    return build


BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
DIFFUSERS: dict[str, Callable[[], Built]] = {
    "unet": diffuser("UNet2DModel", lambda: {"sample": images(16)[0], "timestep": torch.tensor(3)}, sample_size=16, **BLOCKS,
                     down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                     attention_head_dim=4),
    "autoencoder": diffuser("AutoencoderKL", lambda: images(16), **BLOCKS, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
    "dit": diffuser("DiTTransformer2DModel",
                    lambda: {"hidden_states": images(8, 4)[0], "timestep": torch.tensor([3, 4]),
                             "class_labels": torch.tensor([1, 2])},
                    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
                    patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4),
}  # fmt: skip


def declare_operators() -> None:
    """A torchvision that was built for CUDA does not load its operators beside a PyTorch for the CPU.

    Its networks need none of them; but without these two declarations it cannot be imported.
    """
    if torch.version.cuda is None and "+cpu" not in version("torchvision") and not LIBRARY:
        LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            LIBRARY[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


LIBRARY: list[torch.library.Library] = []


def vision(name: str, **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        declare_operators()
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10, **settings), images(64)

    return build


def timm_model(name: str, size: int = 64, **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        declare_operators()
        import timm

        return timm.create_model(name, num_classes=10, **settings), images(size)

    return build


TORCHVISION = {
    name: vision(name)
    for name in ("resnet18", "squeezenet1_1", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5", "efficientnet_b0",
                 "regnet_y_400mf", "convnext_tiny")
}  # fmt: skip
TIMM = {
    "vit": timm_model("vit_tiny_patch16_224", depth=2, img_size=64),
    "resnet26d": timm_model("resnet26d"),
    "xcit": timm_model("xcit_nano_12_p16_224", depth=2, img_size=64),
    "ghostnet": timm_model("ghostnet_050"),
    "convnextv2": timm_model("convnextv2_atto"),
    "mobilevit": timm_model("mobilevit_xxs"),
}

LIBRARIES = {
    "torch": TORCH, "transformers": TRANSFORMERS, "torch_geometric": GEOMETRIC, "diffusers": DIFFUSERS,
    "torchvision": TORCHVISION, "timm": TIMM,
}  # fmt: skip
