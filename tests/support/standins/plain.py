# SPDX-License-Identifier: Apache-2.0
"""Layers whose two heads are plain convolutions, named and used as the public models do."""

import torch
import torch.nn.functional as F
from torch import nn


def resized(labels, x):
    return F.interpolate(labels, size=x.shape[2:], mode="nearest")


class SPADE(nn.Module):
    """NVlabs, GAN Compression (hidden), ASAPNet (and its slim layer, 16 hidden channels), LivePortrait (instance)."""

    def __init__(self, norm_nc, label_nc, norm="batch", kernel_size=3, hidden=128):
        super().__init__()
        pad = kernel_size // 2
        if norm == "instance":
            self.param_free_norm = nn.InstanceNorm2d(norm_nc, affine=False)
        else:
            self.param_free_norm = nn.BatchNorm2d(norm_nc, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, hidden, kernel_size, padding=pad), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, norm_nc, kernel_size, padding=pad)
        self.mlp_beta = nn.Conv2d(hidden, norm_nc, kernel_size, padding=pad)

    def forward(self, x, segmap):
        normalized = self.param_free_norm(x)
        actv = self.mlp_shared(resized(segmap, x))
        return normalized * (1 + self.mlp_gamma(actv)) + self.mlp_beta(actv)


class CLADESPADE(SPADE):
    def forward(self, x, segmap, input_dist=None):
        out = super().forward(x, segmap)
        return out if input_dist is None else out * (1 + input_dist.mean())


class LivePortraitBlock(nn.Module):
    def __init__(self, fin, fout, label_nc):
        super().__init__()
        middle, spectral = min(fin, fout), nn.utils.spectral_norm
        self.conv_0 = spectral(nn.Conv2d(fin, middle, 3, padding=1))
        self.conv_1 = spectral(nn.Conv2d(middle, fout, 3, padding=1))
        if fin != fout:
            self.conv_s = spectral(nn.Conv2d(fin, fout, 1, bias=False))
        self.norm_0 = SPADE(fin, label_nc, "instance")
        self.norm_1 = SPADE(middle, label_nc, "instance")
        if fin != fout:
            self.norm_s = SPADE(fin, label_nc, "instance")

    def forward(self, x, seg):
        shortcut = self.conv_s(self.norm_s(x, seg)) if hasattr(self, "conv_s") else x
        out = self.conv_0(F.leaky_relu(self.norm_0(x, seg), 0.2))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(out, seg), 0.2))


class OASISSPADE(nn.Module):
    def __init__(self, norm_nc, label_nc, hidden=128):
        super().__init__()
        self.first_norm = nn.BatchNorm2d(norm_nc, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, norm_nc, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, norm_nc, 3, padding=1)

    def forward(self, x, segmap):
        actv = self.mlp_shared(resized(segmap, x))
        return self.first_norm(x) * (1 + self.mlp_gamma(actv)) + self.mlp_beta(actv)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x if x.dtype == torch.float64 else x.float()).type(x.dtype)


class StableSRSPADE(nn.Module):
    """The map comes from a dictionary keyed by x's width."""

    def __init__(self, norm_nc, label_nc, hidden=128):
        super().__init__()
        self.param_free_norm = GroupNorm32(32, norm_nc)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, norm_nc, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, norm_nc, 3, padding=1)

    def forward(self, x_dic, segmap_dic, size=None):
        segmap = segmap_dic[str(x_dic.shape[-1])]
        actv = self.mlp_shared(segmap)
        return self.param_free_norm(x_dic) * (1 + self.mlp_gamma(actv)) + self.mlp_beta(actv)


class SEANSPADE(SPADE):
    """Returns gamma and beta; its norm is not used."""

    def forward(self, segmap):
        actv = self.mlp_shared(segmap)
        return self.mlp_gamma(actv), self.mlp_beta(actv)


class SEANACE(nn.Module):
    """Without style codes."""

    def __init__(self, norm_nc, label_nc):
        super().__init__()
        self.blending_gamma = nn.Parameter(torch.zeros(1))
        self.blending_beta = nn.Parameter(torch.zeros(1))
        self.noise_var = nn.Parameter(torch.zeros(norm_nc))
        self.Spade = SEANSPADE(norm_nc, label_nc)
        self.param_free_norm = nn.BatchNorm2d(norm_nc, affine=False)
        self.noise = None  # to be given in place of the random draw

    def forward(self, x, segmap):
        noise = torch.randn(x.shape[0], x.shape[3], x.shape[2], 1).to(x) if self.noise is None else self.noise
        normalized = self.param_free_norm(x + (noise * self.noise_var).transpose(1, 3))
        gamma, beta = self.Spade(resized(segmap, x))
        return normalized * (1 + gamma) + beta


class RootMeanSquareNorm(nn.Module):
    def __init__(self, epsilon):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + self.epsilon)


class HiFaceGANSPADE(nn.Module):
    """No 1 +, no biases."""

    def __init__(self, norm_nc, label_nc, norm="batch"):
        super().__init__()
        instance = norm == "instance"
        self.param_free_norm = RootMeanSquareNorm(norm_nc) if instance else nn.BatchNorm2d(norm_nc, affine=False)
        hidden = min(128, norm_nc)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, norm_nc, 3, padding=1, bias=False)
        self.mlp_beta = nn.Conv2d(hidden, norm_nc, 3, padding=1, bias=False)

    def forward(self, x, segmap):
        actv = self.mlp_shared(resized(segmap, x))
        return self.param_free_norm(x) * self.mlp_gamma(actv) + self.mlp_beta(actv)
