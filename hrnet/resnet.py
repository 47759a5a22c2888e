"""What HRNet is compared with for pose: SimpleBaseline, a ResNet whose last map is brought back to stride 4 by three
deconvolutions (arXiv 1804.06208; official pose_resnet.py)."""

from typing import Any, Literal

from torch import Tensor, nn

from hrnet.blocks import initialise

RESNETS = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))


class ResNet(nn.Module):
    """timm's ResNet and deconvolutions: stands where an `HRNet` of one map stands.

    Args:
        name: one of `RESNETS`.
        outputs: 1, for it has one map.
        init: see `HRNet`; "normal" also goes for the deconvolutions, as officially.

    Attributes:
        config: the name. channels, strides: of its map, [256] and [4].

    Raises:
        ValueError: for another name, or more outputs than it has.
    """

    def __init__(self, name: str, outputs: int = 1, init: Literal["kaiming", "normal"] = "kaiming") -> None:
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"there is no ResNet {name!r} here; there are {', '.join(RESNETS)}")
        if outputs != 1:
            raise ValueError(
                f"{name} has one map, of stride 4, but the head reads {outputs}: it goes with hrnet.heads.HRNetV1 alone"
            )
        from timm import create_model

        self.config, self.channels, self.strides = name, [256], [4]
        trunk: Any = create_model(name, features_only=True, out_indices=(4,))
        self.trunk: nn.Module = trunk
        layers: list[nn.Module] = []
        for channels in (trunk.feature_info.channels()[-1], 256, 256):
            layers += [
                nn.ConvTranspose2d(channels, 256, 4, 2, 1, bias=False),
                nn.BatchNorm2d(256),
                nn.ReLU(inplace=True),
            ]
        self.deconv_layers = nn.Sequential(*layers)
        initialise(self, init)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # timm lets residual units begin as identities, the official code does not

    def forward(self, image: Tensor) -> list[Tensor]:
        """Of a normalised image `[B, 3, H, W]` the one map, `[B, 256, ceil(H / 4), ceil(W / 4)]`."""
        x = self.deconv_layers(self.trunk(image)[0])
        return [x[..., : -(-image.shape[-2] // 4), : -(-image.shape[-1] // 4)]]
