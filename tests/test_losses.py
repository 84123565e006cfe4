"Losses against their formulas, and the one-pass backward against the usual form."
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokpost.losses import (Adversary, DINODiscriminator, ImageLoss, PatchDiscriminator, augment_for_discriminator,
                            backward, frozen_vit, hinge_loss, semantic_loss)


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def small_decoder(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


class L1(nn.Module):
    def forward(self, a, b): return (a-b).abs().mean((1, 2, 3))


def test_hinge_by_loops():
    real, fake = torch.randn(3, 5), torch.randn(3, 5)
    expected = sum(max(0., 1-r) for r in real.flatten().tolist())/15 + sum(max(0., 1+f) for f in fake.flatten().tolist())/15
    assert hinge_loss(real, fake).item() == pytest.approx(expected/2, rel=1e-5)


def test_lecam_pulls_towards_the_other_sides_mean():
    adversary = Adversary(nn.Flatten(), augment=False, lecam_weight=1., lecam_decay=.5)
    real, fake = torch.full((2, 3, 2, 2), 2.), torch.full((2, 3, 2, 2), -3.)
    loss = adversary.discriminator_loss(real, fake).item()
    means = torch.tensor([1., -1.5])                                     # half way from 0
    assert torch.allclose(adversary.logit_means, means)
    assert loss == pytest.approx((2+1.5)**2 + (1+3)**2, rel=1e-6)        # the hinge is 0 here


@pytest.mark.parametrize('adaptive', [True, False])
@pytest.mark.parametrize('other_images', [True, False])
def test_backward_equals_the_usual_form(adaptive, other_images):
    decoder, images, inputs = small_decoder(), torch.rand(4, 3, 16, 16), torch.randn(2, 4, 3, 16, 16)
    adversary = Adversary(PatchDiscriminator(8, 2), weight=.7, adaptive=adaptive, augment=False)
    loss_fn, last = ImageLoss(L1(), .3), decoder[-1].weight
    def forward():
        reconstruction = decoder(inputs[0])
        return reconstruction, decoder(inputs[1]) if other_images else None, .1*decoder[0].weight.square().sum()
    reconstruction, judged, other = forward()
    image = loss_fn(reconstruction, images)[0]
    adversarial = -adversary.logits(reconstruction if judged is None else judged).mean()
    pulls = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (image, adversarial)]
    weight = pulls[0]/(pulls[1]+1e-4) if adaptive else 1.
    expected = torch.autograd.grad(image + .7*weight*adversarial + other, list(decoder.parameters()))
    reconstruction, judged, other = forward()
    log = backward(reconstruction, images, loss_fn, adversary, last, other, judged)
    for parameter, gradient in zip(decoder.parameters(), expected):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in adversary.parameters())
    assert float(log['loss']) == pytest.approx((image+other).item(), rel=1e-5)


def test_augmentation_keeps_gradients_and_moves_each_image_alone():
    images = torch.rand(64, 3, 16, 16, requires_grad=True)
    augmented = augment_for_discriminator(images)
    assert augmented.shape == images.shape and augmented.isfinite().all()
    augmented.square().sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    holes = (augmented == 0).all(1).flatten(1).sum(1)
    assert (holes >= round(.2*16)**2).all() and holes.unique().numel() > 1


def test_semantic_loss_by_loops():
    tokens, semantics = torch.randn(5, 4), torch.randn(5, 4)
    logits = [[2*sum(a*b for a, b in zip(t, s)) for s in semantics.tolist()] for t in tokens.tolist()]
    rows = sum(math.log(sum(math.exp(x) for x in row)) - row[i] for i, row in enumerate(logits))/5
    columns = sum(math.log(sum(math.exp(x) for x in column)) - column[i] for i, column in enumerate(zip(*logits)))/5
    assert semantic_loss(tokens, semantics, scale=2.).item() == pytest.approx((rows+columns)/2, rel=1e-4)
    unit = semantic_loss(F.normalize(tokens), F.normalize(semantics))
    assert semantic_loss(3*tokens, semantics, normalize=True).item() == pytest.approx(unit.item(), rel=1e-5)


def test_dino_discriminator_freezes_its_backbone_and_sees_pieces_and_wholes():
    net = DINODiscriminator('vit_tiny_patch16_224', pretrained=False, side=32).train()
    assert not net.network.training and not any(p.requires_grad for p in net.network.parameters())
    width = net.network.embed_dim
    assert all((block.attn.qkv.bias[width:2*width] == 0).all() for block in net.network.blocks)
    images = torch.rand(8, 3, 48, 48, requires_grad=True)
    shapes = {net.view(images).shape for _ in range(8)}
    assert shapes == {(8, 3, 32, 32)}
    net(images).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is not None for p in net.heads.parameters())


def test_missing_weights_say_what_to_fetch(monkeypatch):
    import timm
    def offline(*_, **__): raise OSError('no network')
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(FileNotFoundError, match='vit_small_patch16_224.dino.*HF_HOME'):
        frozen_vit('vit_small_patch16_224.dino')
