"Compiled training is training: the graph that a GPU compiles, captured on the CPU."
import pytest
import torch

from tokpost.autoencoder import build_autoencoder, train_autoencoder
from tokpost.autoregressive import RAR, train_generator
from tokpost.data import load_images
from tokpost.losses import build_adversary
from tokpost.run import Processes, compile_in_place


def autoencoder():
    images = load_images('digits', 'validation', 16)
    model = build_autoencoder(latent_channels=2, width=8, multipliers=(1, 2), blocks=1, attention=False)
    train_autoencoder(model, images, steps=2, batch_size=4, lr=1e-3, warmup=1, adversary=build_adversary('patch', 16, 8),
                      discriminator_start=0., precision='fp32')
    return model


def generator():
    torch.manual_seed(0)
    model = RAR(codebook_size=8, num_tokens=4, num_classes=3, width=16, depth=1, heads=2, dropout=0., attention_dropout=0.)
    train_generator(model, (torch.arange(32).view(8, 4) % 8, torch.arange(8) % 3), steps=2, batch_size=4, lr=1e-3, warmup=1,
                    precision='fp32')
    return model


@pytest.mark.parametrize('train', [autoencoder, generator], ids=lambda train: train.__name__)
def test_compiled_equals_eager(train, monkeypatch):
    eager, compiled = train().state_dict(), []
    def compile(self, module):
        compiled.append(module)
        return compile_in_place(module, backend='aot_eager')
    monkeypatch.setattr(Processes, 'compile', compile)
    for name, value in train().state_dict().items(): torch.testing.assert_close(value, eager[name], atol=1e-5, rtol=1e-4)
    assert compiled
