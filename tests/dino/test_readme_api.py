"""The public names as the README uses them."""

import pytest
import torch

from dino.model import DINO, DINOHead, MultiCropWrapper, VisionTransformer, dino_loss


def test_the_readmes_loop_at_a_small_size() -> None:
    torch.manual_seed(0)
    student = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    teacher = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    student_head, teacher_head = DINOHead(24, 64), DINOHead(24, 64)
    dino = DINO(student, teacher, student_head, teacher_head)
    optimizer = torch.optim.AdamW(dino.student.parameters(), lr=1e-3)
    center = torch.zeros(1, 64)
    assert isinstance(dino.student, MultiCropWrapper)

    images = [torch.randn(4, 3, 32, 32) for _ in range(2)] + [torch.randn(4, 3, 16, 16) for _ in range(3)]
    losses = []
    for _ in range(3):
        before = teacher.patch_embed.proj.weight.clone()
        student_out, teacher_out = dino(images)
        assert student_out.shape == (5 * 4, 64) and teacher_out.shape == (2 * 4, 64)
        assert student_out.requires_grad and not teacher_out.requires_grad
        loss, center = dino_loss(student_out, teacher_out, center)
        assert loss.shape == () and center.shape == (1, 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dino.update_teacher(0.996)
        losses.append(loss.item())
        assert not torch.equal(teacher.patch_embed.proj.weight, before)  # the objects given are those that move
    assert losses[-1] < losses[0]


@pytest.mark.acceptance  # smaller named sizes: test_vision_transformer.py
def test_the_papers_size_constructs() -> None:
    student = VisionTransformer(img_size=224, patch_size=16, embed_dim=768)
    teacher = VisionTransformer(img_size=224, patch_size=16, embed_dim=768)
    dino = DINO(student, teacher, DINOHead(768, 65536), DINOHead(768, 65536))
    assert sum(p.numel() for p in student.parameters()) == 85_798_656  # ViT-B/16
    assert student.pos_embed.shape == (1, 197, 768) and len(student.blocks) == 12
    trainable = [p.numel() for p in dino.student.head.parameters() if p.requires_grad]
    assert sum(trainable) == 768 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256 + 256 * 65536
