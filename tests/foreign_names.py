"""Names and shapes of weights as their authors save them, of 21 classes.

Written down from their sources, not from the maps: torchvision 0.29, kazuto1011/deeplab-pytorch,
VainF/DeepLabV3Plus-Pytorch, jfzhang95/pytorch-deeplab-xception, segmentation_models_pytorch 0.6,
OpenMMLab's MMSegmentation, and DeepLab in tensorflow/models.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.architecture import Architecture, Decoder
from pipeline.models.published import published

VAINF = published("v3", "resnet50", output_stride=16)
SMP = replace(
    published("v3", "resnet50"), align_corners=True, dilate_first=True, smoothing=True, width=256
)
NETWORKS: dict[str, tuple[str, Architecture, str]] = {
    "torchvision": ("torchvision", published("v3", "resnet50"), "backbone.x"),
    "torchvision mobilenet": ("torchvision", published("v3", "mobilenetv3-large"), "backbone.x"),
    "kazuto": ("kazuto", replace(published("v2", "resnet101"), multi_scale="inputs"), ""),
    "kazuto at one scale": ("kazuto", published("v2", "resnet101"), ""),
    "vainf v3": ("vainf", VAINF, ""),
    "vainf v3plus": (
        "vainf",
        replace(VAINF, family="v3plus", decoder=Decoder(low=48, widths=(256,))),
        "",
    ),
    "jfzhang": (
        "jfzhang",
        replace(
            published("v3plus", "resnet101", output_stride=16),
            align_corners=True,
            dilate_first=True,
            multi_grid=(1, 2, 4),
        ),
        "",
    ),
    "smp v3": ("smp", SMP, ""),
    "smp v3 of its first releases": ("smp", SMP, "decoder.0.convs.0.0.weight"),
    "smp v3plus": (
        "smp",
        replace(
            SMP,
            family="v3plus",
            output_stride=16,
            separable="bare",
            decoder=Decoder(low=48, widths=(256,)),
        ),
        "decoder.aspp.0.convs.0.0.weight",
    ),
    "mmseg v3": (
        "mmseg",
        replace(published("v3", "resnet50c"), smoothing=False),
        "",
    ),
    "mmseg v3plus": (
        "mmseg",
        replace(published("v3plus", "resnet101c"), smoothing=False),
        "",
    ),
    "tf xception": ("tf", published("v3plus", "xception65", output_stride=16), ""),
    "tf xception without decoder": ("tf", published("v3", "xception71", output_stride=16), ""),
    "tf beta": ("tf", published("v3", "resnet101-beta", output_stride=16), ""),
    "tf resnet": (
        "tf",
        replace(published("v3", "resnet50-tf", output_stride=16), image_pooling=False),
        "",
    ),
}

"""Layout, network, and a name of weights that tells its variant, where the layout asks."""

NAMES: dict[str, dict[str, tuple[int, ...]]] = {
    "torchvision": {
        "backbone.conv1.weight": (64, 3, 7, 7),
        "backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "backbone.layer4.2.bn3.running_var": (2048,),
        "classifier.0.convs.0.0.weight": (256, 2048, 1, 1),
        "classifier.0.convs.3.0.weight": (256, 2048, 3, 3),
        "classifier.0.convs.4.1.weight": (256, 2048, 1, 1),
        "classifier.0.project.0.weight": (256, 1280, 1, 1),
        "classifier.1.weight": (256, 256, 3, 3),
        "classifier.2.bias": (256,),
        "classifier.4.weight": (21, 256, 1, 1),
        "classifier.4.bias": (21,),
    },
    "torchvision mobilenet": {
        "backbone.0.0.weight": (16, 3, 3, 3),
        "backbone.4.block.2.fc1.weight": (24, 72, 1, 1),
        "backbone.16.1.running_mean": (960,),
        "classifier.0.convs.0.0.weight": (256, 960, 1, 1),
    },
    "kazuto": {
        "base.layer1.conv1.conv.weight": (64, 3, 7, 7),
        "base.layer1.conv1.bn.running_mean": (64,),
        "base.layer2.block1.reduce.conv.weight": (64, 64, 1, 1),
        "base.layer2.block1.conv3x3.conv.weight": (64, 64, 3, 3),
        "base.layer2.block1.increase.bn.weight": (256,),
        "base.layer2.block1.shortcut.conv.weight": (256, 64, 1, 1),
        "base.layer4.block23.increase.conv.weight": (1024, 256, 1, 1),
        "base.layer5.block3.conv3x3.bn.bias": (512,),
        "base.layer5.block1.shortcut.bn.running_var": (2048,),
        "base.aspp.c0.weight": (21, 2048, 3, 3),
        "base.aspp.c3.bias": (21,),
    },
    "kazuto at one scale": {
        "layer1.conv1.conv.weight": (64, 3, 7, 7),
        "aspp.c3.bias": (21,),
    },
    "vainf v3": {
        "backbone.layer4.0.downsample.1.weight": (2048,),
        "classifier.classifier.0.convs.1.0.weight": (256, 2048, 3, 3),
        "classifier.classifier.0.project.1.weight": (256,),
        "classifier.classifier.1.weight": (256, 256, 3, 3),
        "classifier.classifier.4.bias": (21,),
    },
    "vainf v3plus": {
        "classifier.project.0.weight": (48, 256, 1, 1),
        "classifier.project.1.bias": (48,),
        "classifier.aspp.convs.4.2.weight": (256,),
        "classifier.aspp.project.0.weight": (256, 1280, 1, 1),
        "classifier.classifier.0.weight": (256, 304, 3, 3),
        "classifier.classifier.1.weight": (256,),
        "classifier.classifier.3.weight": (21, 256, 1, 1),
    },
    "jfzhang": {
        "backbone.layer3.22.conv3.weight": (1024, 256, 1, 1),
        "aspp.aspp1.atrous_conv.weight": (256, 2048, 1, 1),
        "aspp.aspp4.atrous_conv.weight": (256, 2048, 3, 3),
        "aspp.aspp4.bn.running_mean": (256,),
        "aspp.global_avg_pool.1.weight": (256, 2048, 1, 1),
        "aspp.global_avg_pool.2.bias": (256,),
        "aspp.conv1.weight": (256, 1280, 1, 1),
        "aspp.bn1.weight": (256,),
        "decoder.conv1.weight": (48, 256, 1, 1),
        "decoder.bn1.weight": (48,),
        "decoder.last_conv.0.weight": (256, 304, 3, 3),
        "decoder.last_conv.1.weight": (256,),
        "decoder.last_conv.4.weight": (256, 256, 3, 3),
        "decoder.last_conv.5.running_var": (256,),
        "decoder.last_conv.8.weight": (21, 256, 1, 1),
    },
    "smp v3": {
        "encoder.conv1.weight": (64, 3, 7, 7),
        "decoder.aspp.convs.0.0.weight": (256, 2048, 1, 1),
        "decoder.aspp.convs.4.2.running_var": (256,),
        "decoder.aspp.project.0.weight": (256, 1280, 1, 1),
        "decoder.conv.weight": (256, 256, 3, 3),
        "decoder.bn.weight": (256,),
        "segmentation_head.0.weight": (21, 256, 1, 1),
    },
    "smp v3 of its first releases": {
        "decoder.0.convs.0.0.weight": (256, 2048, 1, 1),
        "decoder.1.weight": (256, 256, 3, 3),
        "decoder.2.weight": (256,),
    },
    "smp v3plus": {
        "decoder.aspp.0.convs.0.0.weight": (256, 2048, 1, 1),
        "decoder.aspp.0.convs.1.0.0.weight": (2048, 1, 3, 3),
        "decoder.aspp.0.convs.1.0.1.weight": (256, 2048, 1, 1),
        "decoder.aspp.0.convs.1.1.running_mean": (256,),
        "decoder.aspp.0.project.1.bias": (256,),
        "decoder.aspp.1.0.weight": (256, 1, 3, 3),
        "decoder.aspp.1.1.weight": (256, 256, 1, 1),
        "decoder.aspp.2.weight": (256,),
        "decoder.block1.0.weight": (48, 256, 1, 1),
        "decoder.block1.1.weight": (48,),
        "decoder.block2.0.0.weight": (304, 1, 3, 3),
        "decoder.block2.0.1.weight": (256, 304, 1, 1),
        "decoder.block2.1.weight": (256,),
        "segmentation_head.0.bias": (21,),
    },
    "mmseg v3": {
        "backbone.stem.0.weight": (32, 3, 3, 3),
        "backbone.stem.1.weight": (32,),
        "backbone.stem.3.weight": (32, 32, 3, 3),
        "backbone.stem.4.weight": (32,),
        "backbone.stem.6.weight": (64, 32, 3, 3),
        "backbone.stem.7.running_mean": (64,),
        "backbone.layer1.0.conv1.weight": (64, 64, 1, 1),
        "decode_head.image_pool.1.conv.weight": (512, 2048, 1, 1),
        "decode_head.image_pool.1.bn.weight": (512,),
        "decode_head.aspp_modules.0.conv.weight": (512, 2048, 1, 1),
        "decode_head.aspp_modules.3.conv.weight": (512, 2048, 3, 3),
        "decode_head.aspp_modules.3.bn.bias": (512,),
        "decode_head.bottleneck.conv.weight": (512, 2560, 3, 3),
        "decode_head.bottleneck.bn.weight": (512,),
        "decode_head.conv_seg.weight": (21, 512, 1, 1),
        "decode_head.conv_seg.bias": (21,),
    },
    "mmseg v3plus": {
        "decode_head.aspp_modules.0.conv.weight": (512, 2048, 1, 1),
        "decode_head.aspp_modules.1.depthwise_conv.conv.weight": (2048, 1, 3, 3),
        "decode_head.aspp_modules.1.depthwise_conv.bn.weight": (2048,),
        "decode_head.aspp_modules.3.pointwise_conv.conv.weight": (512, 2048, 1, 1),
        "decode_head.aspp_modules.3.pointwise_conv.bn.weight": (512,),
        "decode_head.c1_bottleneck.conv.weight": (48, 256, 1, 1),
        "decode_head.c1_bottleneck.bn.weight": (48,),
        "decode_head.sep_bottleneck.0.depthwise_conv.conv.weight": (560, 1, 3, 3),
        "decode_head.sep_bottleneck.0.pointwise_conv.conv.weight": (512, 560, 1, 1),
        "decode_head.sep_bottleneck.1.pointwise_conv.bn.running_var": (512,),
    },
    "tf xception": {
        "xception_65/entry_flow/conv1_1/weights": (3, 3, 3, 32),
        "xception_65/entry_flow/conv1_2/BatchNorm/moving_variance": (64,),
        "xception_65/entry_flow/block1/unit_1/xception_module/shortcut/weights": (1, 1, 64, 128),
        "xception_65/entry_flow/block2/unit_1/xception_module/separable_conv2_pointwise/"
        "BatchNorm/gamma": (256,),
        "xception_65/middle_flow/block1/unit_16/xception_module/separable_conv3_depthwise/"
        "depthwise_weights": (3, 3, 728, 1),
        "xception_65/exit_flow/block1/unit_1/xception_module/separable_conv2_pointwise/weights": (
            1, 1, 728, 1024,
        ),
        "xception_65/exit_flow/block2/unit_1/xception_module/separable_conv3_pointwise/"
        "BatchNorm/beta": (2048,),
        "image_pooling/weights": (1, 1, 2048, 256),
        "aspp0/BatchNorm/moving_mean": (256,),
        "aspp1_depthwise/depthwise_weights": (3, 3, 2048, 1),
        "aspp3_pointwise/BatchNorm/gamma": (256,),
        "concat_projection/weights": (1, 1, 1280, 256),
        "decoder/feature_projection0/weights": (1, 1, 256, 48),
        "decoder/decoder_conv0_depthwise/depthwise_weights": (3, 3, 304, 1),
        "decoder/decoder_conv1_pointwise/weights": (1, 1, 256, 256),
        "logits/semantic/weights": (1, 1, 256, 21),
        "logits/semantic/biases": (21,),
    },
    "tf xception without decoder": {
        "xception_71/entry_flow/block5/unit_1/xception_module/shortcut/BatchNorm/beta": (728,),
        "logits/semantic/weights": (1, 1, 256, 21),
    },
    "tf beta": {
        "resnet_v1_101/conv1_1/weights": (3, 3, 3, 64),
        "resnet_v1_101/conv1_3/weights": (3, 3, 64, 128),
        "resnet_v1_101/conv1_3/BatchNorm/gamma": (128,),
        "resnet_v1_101/block1/unit_1/bottleneck_v1/shortcut/weights": (1, 1, 128, 256),
        "resnet_v1_101/block3/unit_23/bottleneck_v1/conv2/weights": (3, 3, 256, 256),
        "aspp1/weights": (3, 3, 2048, 256),
    },
    "tf resnet": {
        "resnet_v1_50/conv1/weights": (7, 7, 3, 64),
        "resnet_v1_50/block4/unit_3/bottleneck_v1/conv3/BatchNorm/moving_mean": (2048,),
        "concat_projection/weights": (1, 1, 1024, 256),
    },
}  # fmt: skip
