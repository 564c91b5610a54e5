"""What `--data` may be: packed, tables, marks of UTF-16, and binary files under any name."""

import bz2
import gzip
import io
import json
import lzma
import mmap
import os
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from lowrank_sys.cli import CommandError
from lowrank_sys.train import data, documents
from lowrank_sys.train.rows import Text

ROWS = ["first", "NA", "null", "", " spaces ", "two\nlines", 'a "quoted", text', "1.0", "Grüße 数据 😀", "x\u2028y", "tab\there"]


def zst(content):
    file = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(file, "zstd") as packed:
        packed.write(content)
    return file.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


def lines(rows):
    return "".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(rows)).encode()


def array(rows):
    return json.dumps([{"id": i, "text": row} for i, row in enumerate(rows)], indent=1, ensure_ascii=False).encode()


def delimited(rows, delimiter=",", mark=""):
    quoted = ('"{}"'.format(row.replace('"', '""')) for row in rows)
    return (mark + f"id{delimiter}text\r\n" + "".join(f"{i}{delimiter}{row}\r\n" for i, row in enumerate(quoted))).encode()


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), "text": rows}), file)
    return file.getvalue()


def arrow(rows, kind):
    table, file = pyarrow.table({"id": range(len(rows)), "text": pyarrow.array(rows).dictionary_encode()}), io.BytesIO()
    with kind(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return file.getvalue()


TABLES = {
    "rows.jsonl": lines(ROWS),
    "rows.ndjson": lines(ROWS),
    "array.json": array(ROWS),
    "lines.json": lines(ROWS),
    "utf16.jsonl": lines(ROWS).decode().encode("utf-16"),
    "rows.csv": delimited(ROWS),
    "semicolon.csv": delimited(ROWS, ";"),
    "marked.csv": delimited(ROWS, mark="\ufeff"),
    "rows.tsv": delimited(ROWS, "\t"),
    "ROWS.CSV": delimited(ROWS),
    "rows.parquet": parquet(ROWS),
    "renamed.txt": parquet(ROWS),
    "rows.arrow": arrow(ROWS, pyarrow.ipc.new_file),
    "stream.arrow": arrow(ROWS, pyarrow.ipc.new_stream),
}


def read(path, content, field="text"):
    path.write_bytes(content)
    return [document.decode() for document in documents.read(str(path), Text(field))]


def refused(path, content):
    with pytest.raises(CommandError) as caught:
        read(path, content)
    message = str(caught.value)
    assert caught.value.code == 2 and message.startswith(f"--data {path}") and "\n" not in message and len(message) < 600
    return message.removeprefix(f"--data {path}: ")


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", TABLES)
def test_tables_in_every_packing(tmp_path, name, packed):
    assert read(tmp_path / (name + packed), PACK[packed](TABLES[name])) == ROWS


@pytest.mark.parametrize("packed", list(PACK)[1:])
def test_packed_files(tmp_path, packed):
    content, pack = b"some words\r\n" * 20_000, PACK[packed]
    assert read(tmp_path / f"a.txt{packed}", pack(content)) == [content.decode()]
    assert read(tmp_path / "a.txt", pack(content)) == [content.decode()]  # by content, whatever the name says
    assert read(tmp_path / f"a.txt{packed}", pack(content[:7]) + pack(content[7:])) == [content.decode()]
    for broken in (pack(random.Random(0).randbytes(5000))[:-9], b"not packed at all"):
        assert refused(tmp_path / f"b.jsonl{packed}", broken).startswith("cannot read it: ")
        assert refused(tmp_path / f"b.txt{packed}", broken).startswith("cannot read it: ")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"b{packed}").write_bytes(pack(content)[:-9])
    with pytest.raises(CommandError, match=rf"folder/b{packed}: cannot read it"):
        list(documents.read(str(tmp_path / "folder")))


def test_an_error_inside_the_block_of_a_packed_file(tmp_path):
    packed = bytearray(gzip.compress(random.Random(0).randbytes(50_000)))
    packed[15] ^= 0xFF  # the length of a stored block
    assert "cannot read it" in refused(tmp_path / "a.csv.gz", bytes(packed))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["", "-le", "-be"])
def test_texts_with_a_mark(tmp_path, encoding, order):
    text = "Grüße 数据\n" * 9
    content = text.encode(encoding) if not order or encoding == "utf-8-sig" else ("\ufeff" + text).encode(encoding + order)
    assert [read(tmp_path / "a.txt", content)[0].removeprefix("\ufeff")] == [text]


def png():
    pixels = zlib.compress(random.Random(0).randbytes(3000))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 30, 30, 8, 2, 0, 0, 0) + b"\0\0\0\0" + pixels


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 900
        archive.addfile(entry, io.BytesIO(b"words " * 150))
    return file.getvalue()


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "words " * 100)
    return file.getvalue()


BINARY = {
    "a renamed picture": png(),
    "a tar archive": tar(),
    "a zip archive": zipped(),
    "an old PDF": b"%PDF-1.1\n1 0 obj << /Length 9 >>\n" * 9,
    "no zero anywhere": b"\xff\xd8\xff\xe0" + random.Random(1).randbytes(9000).replace(b"\0", b"\1"),
    "one NUL at the end": b"words " * 50_000 + b"\0",
    "UTF-16 without a mark": ("words " * 50).encode("utf-16-le"),
    "UTF-16 of an odd length": "words".encode("utf-16") + b"x",
    "tokens": struct.pack("<999H", *range(999)),
    "floats": struct.pack("<500f", *(random.Random(2).random() for _ in range(500))),
    "Shift JIS": "日本語の文章。".encode("shift-jis") * 20,
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    "SQLite": b"SQLite format 3\0" + b"\1" * 300,
}


@pytest.mark.parametrize("kind", BINARY)
def test_nothing_binary_is_trained_on(tmp_path, kind, capsys):
    for name in ("a.txt", "a", "a.md.gz", "a.jsonl", "a.csv", "a.json"):
        content = gzip.compress(BINARY[kind]) if name.endswith(".gz") else BINARY[kind]
        assert refused(tmp_path / name, content)
    for path in tmp_path.iterdir():
        if path.suffix in (".jsonl", ".csv", ".json"):
            path.unlink()
    (tmp_path / "good.txt").write_text("good")
    assert [*documents.read(str(tmp_path))] == [b"good"]
    assert "3 files in" in capsys.readouterr().err
    with pytest.raises(CommandError, match="it is no text"):
        list(documents.read(str(tmp_path / "*")))


@pytest.mark.parametrize("text", ["plain", "\x1b[31mred\x1b[0m \x0c", "数据" * 40_000, "BZh is no bzip2", "PK is no zip", "PAR1S"])
def test_text_is_text_as_it_is(tmp_path, text):
    assert read(tmp_path / "a", text.encode()) == [text]
    western = ("déjà vu, " * 9 + "plain words " * 20).encode("latin-1")
    (tmp_path / "a").write_bytes(western)
    assert list(documents.read(str(tmp_path / "a"))) == [western]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", b'["a", "b"]', "item 1 is a str, not an object"),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', "item 2: no text"),
        ("a.json", b'{"body": "b"}', "fields: body"),
        ("a.json", b'[{"text": "a"},]', "is not JSON"),
        ("a.json", b"7", "is a int"),
        ("a.json", b'{"text": "a"}\n{"text": 3}\n', "line 2: no text"),
        ("a.csv", b"id,body\n1,b\n", "fields: id, body"),
        ("a.csv", b"id,text\n1,a\n2\n", "line 3: no text"),
        ("a.csv", b'id,text\n1,"a"b\n', "no table"),
        ("a.csv", b"text\n" + b"ok\n" * 99 + b"\xff\n", "no table of UTF-8 text"),
        ("a.arrow", b"words", "it is not Arrow"),
        ("a.parquet", parquet(["a"])[:-4], "it is not Parquet"),
        ("a.parquet", parquet([None]), "no text"),
        ("a.arrow", arrow(["a"], pyarrow.ipc.new_file)[:-30], "it is not Arrow"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    with pytest.raises(CommandError) as caught:
        read(path, content)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_bad_tables_say_nothing_else(tmp_path, capfd):
    content = parquet(["words " * 999])
    middle = content.index(b"words")
    refused(tmp_path / "a.parquet", content[:middle] + b"\xff" * 9 + content[middle + 9 :])
    refused(tmp_path / "b.arrow", b"words")
    refused(tmp_path / "c.arrow", arrow(ROWS, pyarrow.ipc.new_stream)[:-30])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("content", [parquet(ROWS), arrow(ROWS, pyarrow.ipc.new_file), arrow(ROWS, pyarrow.ipc.new_stream)])
def test_numbers_are_no_text(tmp_path, content, pack):
    with pytest.raises(CommandError, match="row 1: no text in the field 'id'"):
        read(tmp_path / "a", PACK[pack](content), "id")
    with pytest.raises(CommandError, match="no text in the field 'body'; fields: id, text"):
        read(tmp_path / "a", PACK[pack](content), "body")


@pytest.mark.parametrize(
    "name", ["a[1].parquet", "*.arrow", "what?.parquet", ".hidden.arrow", "__x__/a.parquet", "a::b.arrow", ".x/a.arrow", "a%20é"]
)
def test_any_name(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    content = arrow(ROWS, pyarrow.ipc.new_file) if "arrow" in name else parquet(ROWS)
    (tmp_path / "a1.parquet").write_bytes(parquet(["another"]))
    assert read(path, content) == ROWS
    monkeypatch.chdir(tmp_path)
    assert [text.decode() for text in documents.read(name)] == ROWS


@pytest.mark.parametrize(
    "kind, values",
    [
        (pyarrow.map_(pyarrow.string(), pyarrow.int64()), [[("k", 1)], []]),
        (pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string())), [[[("k", "v")]], []]),
        (pyarrow.decimal128(10, 2), [1, 2]),
    ],
)
def test_columns_beside_the_text_may_be_of_any_type(tmp_path, kind, values):
    file = io.BytesIO()
    columns = {"meta": pyarrow.array(values, kind), "text": ["a", "b"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    assert read(tmp_path / "a.parquet", file.getvalue()) == ["a", "b"]


@pytest.mark.parametrize(
    "kind", [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
)
def test_texts_of_any_layout(tmp_path, kind):
    table, file = pyarrow.table({"text": pyarrow.array(ROWS).cast(kind)}), io.BytesIO()
    with pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "a.arrow", file.getvalue()) == ROWS
    with pytest.raises(CommandError, match="row 1: no text"):
        read(tmp_path / "b.parquet", parquet([b"bytes", b"\xff\xfe"]))


def test_local_tables_need_no_network_and_leave_nothing_behind(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("rows.parquet", "rows.arrow", "rows.csv"):
        for packed in PACK:
            (folder / (name + packed)).write_bytes(PACK[packed](TABLES[name]))
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(folder)],
        env=os.environ
        | {"HOME": "/proc/nowhere", "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(len(ROWS) * len(before)), "")
    assert sorted(folder.rglob("*")) == before and list(tmp_path.iterdir()) == [folder]


OFFLINE = """
import socket, sys
def refuse(*args): raise AssertionError("the network")
socket.socket.connect = socket.getaddrinfo = refuse
from lowrank_sys.train import documents
print(len(list(documents.read(sys.argv[1]))))
"""


def test_text_json_and_csv_import_no_reader_of_tables(tmp_path):
    for name in ("rows.jsonl", "array.json", "rows.csv"):
        (tmp_path / name).write_bytes(TABLES[name])
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    program = OFFLINE + "print({'datasets', 'pyarrow', 'pandas', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(3 * len(ROWS) + 1), "set()"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", lines(["a", "b\0c", "d", "\0"])),
        ("a.json", array(["a", "b\0c", "d", "\0"])),
        ("a.parquet", parquet(["a", "b\0c", "d", "\0"])),
        ("a.arrow", arrow(["a", "b\0c", "d", "\0"], pyarrow.ipc.new_stream)),
    ],
)
def test_rows_with_nul_are_passed_over(tmp_path, name, content, capsys):
    assert read(tmp_path / name, content) == ["a", "d"]
    assert "2 rows of" in capsys.readouterr().err


@pytest.mark.parametrize("packed", PACK)
def test_large_texts_are_mapped(tmp_path, packed, monkeypatch, capsys):
    monkeypatch.setattr(documents, "IN_MEMORY", 1000)
    for text in (b"x" * 1000, b"x" * 1001, "Grüße\r\n".encode() * 9999, "déjà vu, plain words\n".encode("latin-1") * 99):
        (tmp_path / "a").write_bytes(PACK[packed](text))
        [found] = documents.read(str(tmp_path / "a"))
        assert bytes(found) == text and isinstance(found, bytes if len(text) == 1000 else mmap.mmap)
    for bad in (
        b"words " * 9999 + b"\0",
        random.Random(0).randbytes(9000).replace(b"\0", b"\1"),
        ("words " * 999).encode("utf-16-le"),
    ):
        assert refused(tmp_path / "a", PACK[packed](bad)).startswith("it is no text")
    if packed:
        assert refused(tmp_path / "a", PACK[packed](random.Random(0).randbytes(5000))[:-9]).startswith(("it is no", "cannot read"))


def test_json_in_a_folder_is_rows_only_where_it_looks_like_rows(tmp_path):
    config = '{\n "name": "a",\n "list": [{"x": 1}]\n}\n'
    (tmp_path / "package.json").write_text(config)
    (tmp_path / "rows.json").write_bytes(array(["a"]))
    (tmp_path / "z.json").write_bytes(lines(["b", "c"]))
    assert [*documents.read(str(tmp_path))] == [config.encode(), b"a", b"b", b"c"]


def test_a_field_of_any_length(tmp_path):
    long = "x" * 3_000_000
    assert read(tmp_path / "a.csv", delimited([long, "b"])) == [long, "b"]


def test_what_is_no_file_is_passed_over(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a:b").write_text("a name like that of a data set")
    assert [*documents.read(str(tmp_path))] == [*documents.read(str(tmp_path / "a:b"))] == [b"a name like that of a data set"]


def word_tokenizer(folder, vocab, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>" if "<unk>" in vocab else None))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "vocab, size", [({"<unk>": 0, "a": 1, "b": 900}, 901), ({"<unk>": 5, "a": 6, "b": 7}, 8), ({"<unk>": 0, "a": 1, "b": 2}, 3)]
)
def test_a_vocabulary_covers_every_id(tmp_path, vocab, size):
    (tmp_path / "a.txt").write_text("a b c " * 50)
    corpus = data.load(str(tmp_path / "a.txt"), seq_len=8, tokenizer=word_tokenizer(tmp_path / "t", vocab, unk_token="<unk>"))
    assert corpus.vocab == size > max(corpus.train.max(), corpus.valid.max())


def test_added_tokens_count_and_no_known_word_is_one_line(tmp_path):
    folder = word_tokenizer(tmp_path / "t", {"<unk>": 0, "a": 7}, unk_token="<unk>", eos_token="<end>", pad_token="<pad>")
    assert data.vocabulary(data.load_tokenizer(folder)) > data.load_tokenizer(folder).eos_token_id
    (tmp_path / "a.txt").write_text("none of these is known " * 9)
    with pytest.raises(CommandError, match="--tokenizer .*: it cannot read the text"):
        data.load(str(tmp_path / "a.txt"), seq_len=8, tokenizer=word_tokenizer(tmp_path / "u", {"zzz": 0}))
