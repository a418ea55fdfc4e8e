# SPDX-License-Identifier: Apache-2.0
"""Layers that pad, split, merge or normalize in other ways."""

import torch
import torch.nn.functional as F
from torch import nn

from standins.plain import resized


class Separable(nn.Module):
    """Depthwise 3×3, a norm or none, 1×1."""

    def __init__(self, fin, fout, norm):
        super().__init__()
        between = nn.InstanceNorm2d(fin) if norm == "instance" else nn.Identity()
        self.conv = nn.Sequential(nn.Conv2d(fin, fin, 3, padding=1, groups=fin), between, nn.Conv2d(fin, fout, 1))

    def forward(self, x):
        return self.conv(x)


class MobileSPADE(nn.Module):
    def __init__(self, norm_nc, label_nc, hidden=16, norm="none"):
        super().__init__()
        self.param_free_norm = nn.BatchNorm2d(norm_nc, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = Separable(hidden, norm_nc, norm)
        self.mlp_beta = Separable(hidden, norm_nc, norm)

    def forward(self, x, segmap):
        normalized = self.param_free_norm(x)
        actv = self.mlp_shared(resized(segmap, x))
        return normalized * (1 + self.mlp_gamma(actv)) + self.mlp_beta(actv)


class SIGEFusedSPADE(nn.Module):
    """Takes the hidden map; gamma and beta from one convolution."""

    def __init__(self, norm_nc, hidden=128):
        super().__init__()
        self.param_free_norm = nn.InstanceNorm2d(norm_nc, affine=False)
        self.mlp_gamma_beta = nn.Conv2d(hidden, 2 * norm_nc, 3, padding=1)

    def forward(self, x, actv):
        gamma, beta = self.mlp_gamma_beta(actv).chunk(2, dim=1)
        return self.param_free_norm(x) * (1 + gamma) + beta


class ConvBlock(nn.Module):
    def __init__(self, fin, fout, kernel_size, spectral, activation):
        super().__init__()
        conv = nn.Conv2d(fin, fout, kernel_size, padding=kernel_size // 2)
        self.layers = nn.ModuleDict({"conv": nn.utils.spectral_norm(conv) if spectral else conv})
        if activation:
            self.layers["nonlinearity"] = nn.ReLU(inplace=True)

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


class ImaginaireNorm(nn.Module):
    """Kernels of 5, spectral norm by hooks, an affine batch norm, merged gamma and beta, maps as further arguments."""

    def __init__(self, norm_nc, label_nc, kernel_size=5, hidden=16, spectral=True, affine=True):
        super().__init__()
        first = ConvBlock(label_nc, hidden, kernel_size, spectral, True)
        second = ConvBlock(hidden, 2 * norm_nc, kernel_size, spectral, False)
        self.mlps = nn.ModuleList([nn.Sequential(first, second)])
        self.norm = nn.BatchNorm2d(norm_nc, affine=affine)

    def forward(self, x, *cond_inputs):
        output = self.norm(x)
        for mlp, cond in zip(self.mlps, cond_inputs, strict=True):
            gamma, beta = mlp(resized(cond, x)).chunk(2, dim=1)
            output = output * (1 + gamma) + beta
        return output


class MONAIConvolution(nn.Sequential):
    def __init__(self, fin, fout, dims=2, kernel_size=3, norm=False, slope=None):
        super().__init__()
        kinds = {
            1: (nn.Conv1d, nn.InstanceNorm1d),
            2: (nn.Conv2d, nn.InstanceNorm2d),
            3: (nn.Conv3d, nn.InstanceNorm3d),
        }
        conv, instance = kinds[dims]
        self.add_module("conv", conv(fin, fout, kernel_size, padding=kernel_size // 2))
        if norm:
            self.add_module("adn", nn.Sequential())
            self.adn.add_module("N", instance(fout))
        if slope is not None:
            self.add_module("adn", nn.Sequential())
            self.adn.add_module("A", nn.LeakyReLU(slope))


class MONAISPADE(nn.Module):
    """LeakyReLU behind the first convolution; gamma and beta each pass an instance norm."""

    def __init__(self, label_nc, norm_nc, dims=2, hidden=64, norm=None):
        super().__init__()
        instance = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]
        self.param_free_norm = instance(norm_nc) if norm is None else norm
        self.mlp_shared = MONAIConvolution(label_nc, hidden, dims, slope=0.01)
        self.mlp_gamma = MONAIConvolution(hidden, norm_nc, dims, norm=True)
        self.mlp_beta = MONAIConvolution(hidden, norm_nc, dims, norm=True)

    def forward(self, x, segmap):
        normalized = self.param_free_norm(x.contiguous())
        actv = self.mlp_shared(resized(segmap, x))
        return normalized * (1 + self.mlp_gamma(actv)) + self.mlp_beta(actv)


class MONAIBlock(nn.Module):
    def __init__(self, fin, fout, label_nc, hidden):
        super().__init__()
        middle = min(fin, fout)
        self.conv_0 = MONAIConvolution(fin, middle)
        self.conv_1 = MONAIConvolution(middle, fout)
        self.norm_0 = MONAISPADE(label_nc, fin, hidden=hidden)
        self.norm_1 = MONAISPADE(label_nc, middle, hidden=hidden)
        self.conv_s = MONAIConvolution(fin, fout, kernel_size=1)
        self.norm_s = MONAISPADE(label_nc, fin, hidden=hidden)

    def forward(self, x, seg):
        shortcut = self.conv_s(self.norm_s(x, seg))
        out = self.conv_0(F.leaky_relu(self.norm_0(x, seg), 0.2))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(out, seg), 0.2))


class CoCosNetSPADE(nn.Module):
    """Reflection padding of all convolutions; PONO: normalized over channels at each pixel."""

    def __init__(self, norm_nc, label_nc, pono=False, hidden=128):
        super().__init__()
        self.pono = pono
        if not pono:
            self.param_free_norm = nn.BatchNorm2d(norm_nc, affine=False)
        self.mlp_shared = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(label_nc, hidden, 3), nn.ReLU())
        self.pad = nn.ReflectionPad2d(1)
        self.mlp_gamma = nn.Conv2d(hidden, norm_nc, 3)
        self.mlp_beta = nn.Conv2d(hidden, norm_nc, 3)

    def forward(self, x, segmap, similarity_map=None):
        if self.pono:
            variance, mean = torch.var_mean(x, dim=1, keepdim=True)
            normalized = (x - mean) / (variance + 1e-5).sqrt()
        else:
            normalized = self.param_free_norm(x)
        actv = self.mlp_shared(resized(segmap, x))
        gamma, beta = self.mlp_gamma(self.pad(actv)), self.mlp_beta(self.pad(actv))
        if similarity_map is not None:
            similarity_map = resized(similarity_map, gamma)
            gamma, beta = gamma * similarity_map, beta * similarity_map
        return normalized * (1 + gamma) + beta
