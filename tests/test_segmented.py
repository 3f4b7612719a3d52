"""support/segmented.py: images and label maps of one size, and folders in VOC layout."""
import torch

from conftest import make_voc_folder, random_maps
from support import segmented
from support.pixels import IGNORED as I


def test_squeezing_keeps_labels_labels_and_the_whole_image():
    maps = random_maps(20, 40, C=2, ignored=.1)
    x = maps.expand(3, -1, -1).clone()  # (3, 20, 40)
    small, labels = segmented.squeeze(x, maps, 10)
    assert small.shape == (3, 10, 10) and labels.shape == (10, 10)
    assert set(labels.unique().tolist()) <= {0, 1, I}
    # 20 x 40 -> 10 x 10: the pixel in whose middle a new one's middle lies
    assert torch.equal(labels, maps[1::2, 2::4])
    again, same = segmented.squeeze(x[:, :, :20], maps[:, :20], 20)
    assert torch.equal(again, x[:, :, :20]) and torch.equal(same, maps[:, :20])


def test_a_folder_in_voc_layout(tmp_path):
    folder = make_voc_folder(tmp_path / "voc")
    train, test, classes = segmented.voc_folder(str(folder), 40, (100, 3))
    assert train.x.shape == (8, 3, 40, 40) and test.maps.shape == (3, 40, 40)
    assert classes == ["class 0", "class 1", "class 2"]
    for i in range(8):
        row = train.maps[i, 5].tolist()
        assert row == [0] * 18 + [I] * 2 + [1 + i % 2] * 20
    # a name may hold spaces: one a line
    (folder / "JPEGImages/val_0.jpg").rename(folder / "JPEGImages/a train image.jpg")
    (folder / "SegmentationClass/val_0.png").rename(folder / "SegmentationClass/a train image.png")
    names = folder / "ImageSets/Segmentation/val.txt"
    names.write_text("a train image\n\n" + names.read_text().partition("\n")[2])
    _, again, _ = segmented.voc_folder(str(folder), 40, (1, 3))
    assert torch.equal(again.x, test.x)
    # four are spread evenly: 0, 2, 4, 6
    few, _, _ = segmented.voc_folder(str(folder), 40, (4, 1))
    assert torch.equal(few.x, train.x[::2])


def test_vocs_names_are_given_where_there_are_21_classes(tmp_path):
    folder = make_voc_folder(tmp_path / "voc", train=20, val=1, classes=21)
    *_, classes = segmented.voc_folder(str(folder), 16, (20, 1))
    assert len(classes) == 21 and classes[1] == "aeroplane" and classes[-1] == "tvmonitor"
    *_, classes = segmented.voc_folder(str(folder), 16, (5, 1))
    assert classes[-1] == "class 17"
