"""Text into token shards, once, so that training reads numbers and nothing else.

    python fineweb.py                      FineWeb-Edu's 10 B token sample into edu_fineweb10B/
    python fineweb.py --streaming          the same without a copy of the raw text on disk
    python fineweb.py --max_tokens 1e9     the first tenth of it
    python fineweb.py --verify             are the shards still what was written?
    python fineweb.py --files "my/*.jsonl.gz" --out_dir my_shards --shard_size 1e6
                                           your own text
    python fineweb.py --files my.txt --separator "<|endoftext|>" --out_dir my_shards
                                           a text of many documents
    python fineweb.py --dataset wikimedia/wikipedia --name 20231101.de --out_dir wiki_de
                                           any text data set of the Hub

A shard is a .npy file of uint16: for each document <|endoftext|> and its tokens, one document after
the other, cut every --shard_size tokens. The first shard is the validation split. A run that was
stopped or killed goes on after its last complete shard when the same command is given again, and
ends with the same bytes. Local files are parquet (a packed table), JSON lines (.jsonl, .json), both
with the text under --text_key, or .txt, each of which is one document, or several with --separator;
.gz and .zst are unpacked. Exit codes: 0 done, or stopped; 1 failed while running; 2 cannot be done
as asked.

FineWeb-Edu: Penedo et al. 2024 (arXiv:2406.17557),
huggingface.co/datasets/HuggingFaceFW/fineweb-edu.
"""
import argparse
import contextlib
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import tiktoken
from tqdm import tqdm

# Nothing comes from train_gpt2.py: with it, PyTorch would come into every worker process.
class UserError(ValueError):
    """What the user asked for cannot be. main() prints it as one line, with the remedy, and exits
    with its code."""
    code = 2

class Failure(UserError):
    """It could be, but something broke while running."""
    code = 1

def require(condition, message):
    """An assert about what the user asked for: raises UserError, also under `python -O`."""
    if not condition:
        raise UserError(message)

# --------------------------------------------------------------------------------------------------
# 1. From text to shards
# One process reads, many tokenize, and the first one writes what they hand back.

def make_shards(args):
    """Make the shards that args ask for, or what is missing of them. Raises UserError, OSError."""
    out_dir = Path(args.out_dir)
    files = find_files(args.files or [], out_dir)
    require(not args.separator or ".txt" in map(kind, files), "--separator is for .txt of --files")
    with alone_in(out_dir):
        manifest = open_manifest(out_dir, arguments(args, files))
        shards = manifest["shards"]
        before = count_tokens(shards)
        so_far = f"{len(shards)} shards, {before:,} tokens"
        if manifest["complete"]:
            print(f"{out_dir} is complete: {so_far} (--verify checks them)")
            return
        with about("no GPT-2 vocabulary to be had", "Connect to the network once, or point "
                   "TIKTOKEN_CACHE_DIR to a folder that has it"):
            tiktoken.get_encoding("gpt2")  # downloads 1.5 MB once, for all processes

        # A record is what is read at a time: a row of a table, a line of JSON, a piece of a .txt.
        # They are counted from the first one of the first file. Those of complete shards are read
        # again, but not tokenized.
        place = shards[-1] if shards else dict(record=0, token=0)
        skip = place["record"]
        if files:
            text = sum(text_bytes(path, args.text_key) for path in files)
            total = sum(path.stat().st_size for path in files)
            chunks = read_files(files, args.text_key, skip, args.separator or "")
        else:
            text, total = size_on_hub(args)
            chunks = read_hub(args, skip)
        # English has 4.5 bytes a token; other languages have fewer.
        expected = max(min(int(text / 4.5), args.max_tokens or sys.maxsize), before)
        check_room(out_dir, 2 * (expected - before))
        if shards:
            print(f"going on after {so_far}")
        source = f"{len(files)} files" if files else args.dataset
        print(f"{source} -> {out_dir} with {args.num_proc} processes", flush=True)

        bar = tqdm(total=expected or None, initial=before, unit=" tokens", unit_scale=True,
                   disable=None)
        with bar, workers(args.num_proc) as pool:
            # Each worker has something to do while the next chunks are read.
            results = tokenized(pool, args.text_key, chunks, 4 * args.num_proc)
            try:
                write_shards(out_dir, manifest, place, results, bar, total)
            except OSError as e:
                raise Failure(f"{e}. Complete shards are kept: once that is mended, the same "
                              "command goes on") from None
    print(f"{out_dir}: {len(shards)} shards, {count_tokens(shards):,} tokens")
    if len(shards) == 1:
        print("All of it is in the validation split: for training too, lower --shard_size")

def tokenize(key, chunk):
    """The tokens of a chunk, (n,) uint16. A document begins with <|endoftext|>; in its text, that
    is text like any other. Raises UserError."""
    enc = tiktoken.get_encoding("gpt2")  # kept by tiktoken after the first time
    parts = [[]]
    records = chunk.records if isinstance(chunk.records, list) else chunk.records.to_pylist()
    for n, record in enumerate(records):
        text = text_of(record, key, f"{chunk.where} {chunk.number + n}")
        if text is not None:
            if n or chunk.begins:
                parts.append([enc.eot_token])
            parts.append(encode(enc, text))
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")

# Where a long row of blanks may be cut without another token coming of it: before its last blank.
# GPT-2's pattern makes one word of all the others, and the last one belongs to what comes after.
# The characters 1C to 1F are blanks to Python and none to tiktoken.
LAST_BLANK = re.compile(r"(?<=[^\S\x1c-\x1f])(?=[^\S\x1c-\x1f][\S\x1c-\x1f])")

def encode(enc, text):
    """The tokens of a text, (n,) uint32: those of enc.encode_ordinary(text), but without a Python
    integer for each, and however many blanks there are in a row."""
    # Half of a surrogate pair is no character. As in encode_ordinary(), U+FFFD takes its place.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        return enc.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        # In a million blanks before a word, tiktoken's regular expression goes back too far. It
        # has no need to where they are the end of a text.
        pieces = LAST_BLANK.split(text)
        return np.concatenate([enc.encode_to_numpy(p, disallowed_special=()) for p in pieces])

HEADER = 128  # bytes before the first token in a .npy file, however many tokens

def write_shards(out_dir, manifest, place, results, bar, total):
    """Write tokens into shards, and into the manifest where each one ends: of the tokens that come
    from record number `record` on, its last one is the `token`-th. place is where the last complete
    shard ends; total is how far the reading gets in the end, 0 if unknown. Raises UserError,
    OSError."""
    size = manifest["shard_size"]
    shards = manifest["shards"]
    most = manifest["max_tokens"] or sys.maxsize
    position = count_tokens(shards)  # in the row of all tokens
    record = place["record"]
    begin = place["token"]
    for records, done, tokens in results:
        while begin < len(tokens) and position < most:
            if position % size == 0:
                f = open(out_dir / UNFINISHED, "wb")
                f.seek(HEADER)
            n = min(size - position % size, most - position, len(tokens) - begin)
            f.write(tokens[begin:begin + n])
            begin += n
            position += n
            bar.update(n)
            if position % size == 0:
                finish(f, out_dir, manifest, size, record, begin)
        if position == most:
            break
        begin = max(begin - len(tokens), 0)
        record += records
        if total and done:
            bar.total = min(position * total // done, most)
    if position % size:
        finish(f, out_dir, manifest, position % size, record, begin)
    bar.total = bar.n
    require(shards, "no document in there")
    manifest["complete"] = True
    save_manifest(out_dir, manifest)

def finish(f, out_dir, manifest, tokens, record, token):
    """A shard has all its tokens: to disk with it, and into the manifest."""
    shards = manifest["shards"]
    name = f"edufineweb_{'train' if shards else 'val'}_{len(shards):06d}.npy"
    f.seek(0)
    np.lib.format.write_array_header_1_0(
        f, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    # A kill may come when the shard has its name and the manifest does not list it yet. Then there
    # is at least this manifest, which says from which arguments the folder's shards are made.
    save_manifest(out_dir, manifest)
    to_disk(f, out_dir / name)
    shards.append(dict(file=name, tokens=tokens, sha256=sha256(out_dir / name), record=record,
                       token=token))
    save_manifest(out_dir, manifest)

def count_tokens(shards):
    """How many tokens there are in all of them."""
    return sum(shard["tokens"] for shard in shards)

# --------------------------------------------------------------------------------------------------
# 2. Reading files
# One process reads for all, so it does as little as it can: it hands on rows of parquet, lines of
# JSON and pieces of .txt as they are, in chunks.

CHUNK = 1_000_000  # bytes of text, about: some 80 ms of work for one process

class Chunk(NamedTuple):
    """What one process tokenizes at a time."""
    records: list  # rows (an Arrow array), lines of JSON (bytes), or pieces of a .txt (str)
    where: str  # what a message calls the first of them: this, and its number
    number: int
    begins: bool  # each record is a document; False: the first one goes on with the one before
    done: int  # how far the reading is: bytes of all files, or documents of the Hub

def read_files(files, key, skip, separator=""):
    """Chunks of local files, in order, from the skip-th record on. Raises UserError if a file is
    not what it should be."""
    before = 0
    for path in files:
        number = 1
        with reading(path), open(path, "rb") as raw:
            for what, records, begins in READERS[kind(path)](raw, key, separator):
                if skip < len(records):
                    yield Chunk(records[skip:], f"{path}, {what}", number + skip,
                                begins or skip > 0, before + raw.tell())
                number += len(records)
                skip = max(skip - len(records), 0)
        before += path.stat().st_size

# A reader is given a file, the key and the separator. It yields what one record is called, some
# records, and whether the first of them begins a document.
def read_json_lines(raw, key, separator):
    file = unpacked(raw)
    while lines := file.readlines(CHUNK):
        yield "line", lines, True

# Between anything and the space or line's end after it, one of GPT-2's words ends: a word may begin
# with a space, but it has none inside. This finds all up to the last such place.
CUT = re.compile(r"(?s)(.*\S(?=[ \n]))?")

def read_txt(raw, key, separator):
    """One document, or what stands between separators. A long one is cut where a word ends anyway:
    the tokens stay the same, and many processes share the work. Lines end with \\n, as whenever
    Python reads text, and a byte order mark is none of it."""
    text = io.TextIOWrapper(unpacked(raw), encoding="utf-8-sig")
    rest = ""
    begins = True
    while block := text.read(CHUNK):
        rest += block
        ended = []
        if separator:
            *ended, rest = rest.split(separator)
        # At the end of rest, a separator may have begun.
        head = CUT.match(rest, 0, len(rest) - len(separator) + 1)[0]
        rest = rest[len(head):]
        if records := [piece for piece in (*ended, head) if piece]:
            yield "piece", records, begins
        if ended or head:
            begins = not head
    if rest or not separator:
        yield "piece", [rest], begins

def read_parquet(raw, key, separator):
    import pyarrow.parquet
    file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
    names = file.schema_arrow.names
    require(key in names, f"{raw.name} has no column '{key}': --text_key can be {', '.join(names)}")
    columns = (batch.column(0) for batch in file.iter_batches(16, columns=[key]))
    for rows in arrow_chunks(columns, f"{raw.name}, {key}"):
        yield "row", rows, True

READERS = {".parquet": read_parquet, ".jsonl": read_json_lines, ".json": read_json_lines,
           ".txt": read_txt}
PACKED = {".gz": "gzip", ".zst": "zstd"}

def arrow_chunks(arrays, where):
    """Join short Arrow arrays to arrays of about CHUNK bytes. Raises UserError if they are not
    text."""
    import pyarrow
    waiting = []
    size = 0
    for array in arrays:
        require(re.fullmatch(r"null|(large_)?string(_view)?|dictionary<values=(large_)?string,.*",
                             str(array.type)),
                f"{where}: it is no text, but of type {array.type}: see --text_key")
        # A copy of these rows alone, whatever they were a part of.
        array = array.cast(pyarrow.large_string())
        array.validate(full=True)  # is it UTF-8?
        waiting.append(array)
        size += array.nbytes
        if size >= CHUNK:
            yield pyarrow.concat_arrays(waiting)
            waiting = []
            size = 0
    if waiting:
        yield pyarrow.concat_arrays(waiting)

def unpacked(raw):
    """The same file, unpacked if its name says so."""
    how = PACKED.get(Path(raw.name).suffix)
    if not how:
        return raw
    import pyarrow
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, how), 2**20)

def reading(path):
    """Any exception in here is about this file."""
    return about(f"cannot read {path}", "Is it cut short, or of another kind?")

@contextlib.contextmanager
def about(what, remedy, error=UserError):
    """Any exception in here becomes an error that says what it is about, and the remedy."""
    try:
        yield
    except UserError:
        raise
    # There is no end to what a broken file, a network and a data set's own files may raise.
    except Exception as e:
        why = f"{e} ".splitlines()[0].strip() or type(e).__name__
        raise error(f"{what}: {why}. {remedy}") from None

def text_of(record, key, where):
    """The text of a record, "" if it has none; None for an empty line. Raises UserError."""
    if isinstance(record, bytes):
        # A byte order mark may begin any line, where files were joined.
        if not record.removeprefix(b"\xef\xbb\xbf").strip():
            return None
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where} is not JSON in UTF-8: {e}. Mend it or leave it out") from None
        require(isinstance(record, dict),
                f"{where} is no JSON object, such as {{\"{key}\": \"...\"}}, one a line")
        require(key in record, f"{where} has no '{key}': --text_key can be "
                f"{', '.join(record) or 'nothing here'}")
        record = record[key]
    require(isinstance(record, str | None),
            f"{where}: '{key}' is no text but {type(record).__name__}")
    return record or ""

def find_files(patterns, out_dir):
    """The files that names or glob patterns stand for, each once, pattern by pattern in order of
    name; none of out_dir. Raises UserError."""
    files = {}
    for pattern in patterns:
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in map(Path, names)
                 if path.is_file() and out_dir.resolve() not in path.resolve().parents]
        require(found, f"--files {pattern}: no such file that can be read (a folder? name its "
                f"files: \"{Path(pattern) / '*.parquet'}\")")
        for path in found:
            files.setdefault(path.resolve(), path)
            require(kind(path) in READERS,
                    f"{path} is neither .parquet nor .jsonl, .json or .txt (these also with .gz or "
                    ".zst)")
    return list(files.values())

def kind(path):
    """The suffix that says what is in a file: .txt for a.txt.gz."""
    return Path(path.stem if path.suffix in PACKED else path).suffix.lower()

def text_bytes(path, key):
    """About how many bytes of text there are in a local file."""
    if path.suffix != ".parquet":
        return path.stat().st_size * (3 if path.suffix in PACKED else 1)
    import pyarrow.parquet
    with reading(path):
        table = pyarrow.parquet.read_metadata(path)
    columns = [table.row_group(g).column(c)
               for g in range(table.num_row_groups) for c in range(table.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == key)

# --------------------------------------------------------------------------------------------------
# 3. Reading from the Hub
# `datasets` downloads, tries again after a broken connection or too many requests (429), waiting
# longer each time, and keeps what it has.

def read_hub(args, skip):
    """Chunks of a data set of the Hub, or of a folder that is like one, from the skip-th document
    on. Raises UserError."""
    import datasets
    with hub(args):
        data = datasets.load_dataset(
            args.dataset, args.name, split=args.split, streaming=args.streaming,
            num_proc=None if args.streaming else args.num_proc)
        # A stream may learn its columns from its first document only.
        names = data.column_names or list(next(iter(data), {}))
    require(args.text_key in names, f"{args.dataset} has no '{args.text_key}': --text_key can be "
            f"{', '.join(names)}")
    with about(f"{args.dataset} broke off", "The same command goes on where it was", Failure):
        batches = data.select_columns([args.text_key]).with_format("arrow").skip(skip).iter(16)
        arrays = (batch[args.text_key].combine_chunks() for batch in batches)
        for rows in arrow_chunks(arrays, f"{args.dataset}, {args.text_key}"):
            first = skip + 1
            skip += len(rows)
            yield Chunk(rows, f"{args.dataset}, document", first, True, skip)

def size_on_hub(args):
    """How many bytes and documents a split has; 0 where that is unknown. Raises UserError."""
    import datasets
    with hub(args):
        info = datasets.load_dataset_builder(args.dataset, args.name).info
    split = (info.splits or {}).get(args.split, datasets.SplitInfo())
    return split.num_bytes or 0, split.num_examples or 0

def hub(args):
    """Any exception in here is about this data set."""
    return about(f"cannot load {args.dataset}", "Are --name and --split right? Without a network, "
                 "--files takes local files")

# --------------------------------------------------------------------------------------------------
# 4. The folder of the shards
# Whatever happens to the program, a shard is complete or not there. manifest.json says of what they
# were made, how many tokens each has and where to go on.

UNFINISHED = "fineweb.npy.tmp"

@contextlib.contextmanager
def alone_in(out_dir):
    """In here, no other process makes shards in out_dir. If there is none in the end, and no folder
    was before, there is none after. Raises UserError, OSError."""
    made = not out_dir.exists()
    lock_file = out_dir / "fineweb.lock"
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        # The system's lock: it ends with its process, however that ends. The file says nothing.
        lock = filelock.FileLock(lock_file, timeout=0).acquire()
    except filelock.Timeout:
        raise UserError(f"another fineweb.py is at work in {out_dir}: wait for it, or choose "
                        "another --out_dir") from None
    with lock:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (out_dir / UNFINISHED).unlink(missing_ok=True)
                lock_file.unlink()
                if made:
                    out_dir.rmdir()  # no more than an empty one

def arguments(args, files):
    """What decides the shards' bytes. A file is known by its place, size and time of change."""
    keys = ["text_key", "separator", "shard_size", "max_tokens"]
    if not files:
        keys += ["dataset", "name", "split"]
    known = {key: getattr(args, key) for key in keys}
    if files:
        known["files"] = len(files)
    for n, path in enumerate(files, 1):
        stat = path.stat()
        known[f"file {n}"] = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    return known

def open_manifest(out_dir, known):
    """The manifest of an earlier run with the same arguments, or a new one. Raises UserError if
    they were others."""
    new = dict(known, complete=False, shards=[])
    there = [p.name for p in out_dir.glob("*") if p.suffix in (".npy", ".bin")]
    exists = (out_dir / "manifest.json").exists()
    require(exists or not there, f"{out_dir} has shards of another origin, {there[:1]}: choose "
            "another --out_dir")
    manifest = load_manifest(out_dir) if exists else new
    # Without a shard it is nobody's, whatever it says: of a run that came to nothing.
    if not there:
        return new
    for key, now in known.items():
        was = manifest.get(key)
        require(was == now, f"{out_dir} was made with other arguments: {key} was {was}, is {now}: "
                "choose another --out_dir")
    # What was deleted is made again, and all after it.
    def whole(shard):
        path = out_dir / shard["file"]
        return path.is_file() and path.stat().st_size == HEADER + 2 * shard["tokens"]
    shards = list(itertools.takewhile(whole, manifest["shards"]))
    complete = manifest["complete"] and shards == manifest["shards"]
    return dict(manifest, complete=complete, shards=shards)

def load_manifest(out_dir):
    """What save_manifest() saved. Raises UserError."""
    path = out_dir / "manifest.json"
    with about(f"cannot read {path}", "Is that where shards were made?"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        require({"complete", "shards"} <= set(manifest), f"{path} is no manifest of shards")
    return manifest

def save_manifest(out_dir, manifest):
    f = open(out_dir / "fineweb.json.tmp", "w", encoding="utf-8")
    json.dump(manifest, f, indent=1)
    to_disk(f, out_dir / "manifest.json")

def to_disk(f, path):
    """Close f, and give it path's name once it is complete on the disk."""
    f.flush()
    os.fsync(f.fileno())
    f.close()
    os.replace(f.name, path)

def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def check_room(out_dir, need):
    """Is there room for so many bytes more? Raises UserError."""
    free = shutil.disk_usage(out_dir).free
    require(need < free, f"{out_dir} needs about {need / 1e9:.2f} GB more, the disk has "
            f"{free / 1e9:.2f} GB free: make room, or choose another --out_dir or a lower "
            "--max_tokens")

def verify(out_dir):
    """Compare the shards with the manifest. Raises UserError."""
    manifest = load_manifest(out_dir)
    shards = manifest["shards"]
    def changed(shard):
        path = out_dir / shard["file"]
        return not path.is_file() or sha256(path) != shard["sha256"]
    bad = [s["file"] for s in tqdm(shards, "verifying", disable=None) if changed(s)]
    if bad:
        raise Failure(f"not as written: {', '.join(bad)}. Delete them: the command that made them "
                      "does so again")
    print(f"{len(shards)} shards, {count_tokens(shards):,} tokens, all as written")
    if not manifest["complete"]:
        print("not complete: the command that made them goes on")

# --------------------------------------------------------------------------------------------------
# 5. Many processes

def tokenized(pool, key, chunks, ahead):
    """Of each chunk: how many records it has, how far the reading is, its tokens. They come in
    order, although the workers finish in any. As many as `ahead` are under way while the caller
    works."""
    waiting = []
    processes = set()
    for chunk in itertools.chain(chunks, [None]):
        if chunk:
            with ctrl_c_later():
                future = pool.submit(tokenize, key, chunk)
            waiting.append((len(chunk.records), chunk.done, future))
            processes.update(multiprocessing.active_children())
        while len(waiting) > (ahead if chunk else 0):
            records, done, future = waiting.pop(0)
            while not future.done():
                wait([future], timeout=1)
                # The pool does not notice each such end.
                if any(p.exitcode is not None for p in processes):
                    raise BrokenProcessPool
            yield records, done, future.result()

@contextlib.contextmanager
def workers(num_proc):
    """A pool of processes, which end with this one and with what is done in here."""
    # multiprocessing tidies up after a kill, and need not say so.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    # spawn is the same on every system.
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), start_worker)
    try:
        yield pool
    finally:
        # It waits for the workers, but not where that may never end: see main().
        pool.shutdown(sys.exc_info()[0] not in (KeyboardInterrupt, BrokenProcessPool),
                      cancel_futures=True)

def start_worker():
    """Ctrl-C is the parent's to handle. When that ends, for whatever reason, a thread that waits
    for it ends this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()

@contextlib.contextmanager
def ctrl_c_later():
    """What is started in here never hears of Ctrl-C; this process does, afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # What is blocked is inherited. But the thread of a library may be given the signal instead.
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt

# --------------------------------------------------------------------------------------------------
# 6. Command line

def fail(message, code):
    """Write one line, whatever names and libraries put into the message, and exit."""
    print("fineweb.py:", *str(message).splitlines(), file=sys.stderr)
    sys.exit(code)

def count(text):
    """A number of things; 1e8 will do."""
    with contextlib.suppress(ValueError):
        if 1 <= float(text) < 2**63:
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")

def parse_flags():
    """The flags as an argparse.Namespace. Raises UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    cores = min(os.cpu_count() or 1, 61)  # Windows can wait for no more
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    flag = parser.add_argument
    flag("--dataset", default=FINEWEB_EDU, help="data set of the Hub (%(default)s)")
    flag("--name", help="its configuration (sample-10BT for FineWeb-Edu)")
    flag("--split", default="train", help="its split (%(default)s)")
    flag("--streaming", action="store_true",
         help="read it over the network, without a copy on disk")
    flag("--files", nargs="+", help="local files instead, or patterns: parquet, jsonl, txt")
    flag("--text_key", default="text", help="column or key that holds the text (%(default)s)")
    flag("--separator", help="what stands between documents of a .txt (none)")
    flag("--out_dir", default="edu_fineweb10B", help="folder of the shards (%(default)s)")
    flag("--shard_size", type=count, default=10**8, help="tokens in a shard (%(default)s)")
    flag("--max_tokens", type=count, help="stop after so many (all)")
    flag("--num_proc", type=count, default=cores, help="processes that tokenize (%(default)s)")
    flag("--verify", action="store_true", help="compare the shards with the manifest and exit")
    # One line, and not argparse's usage.
    parser.error = lambda message: require(False, f"{message} (--help lists all flags)")
    args = parser.parse_args()
    if args.dataset == FINEWEB_EDU and args.name is None:
        args.name = "sample-10BT"
    return args

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"

def main():
    """Read the flags, do what they ask."""
    # A program without a console has None here: then what it prints goes nowhere.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a character shows "?"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        args = parse_flags()
        if args.verify:
            verify(Path(args.out_dir))
        else:
            make_shards(args)
    except UserError as e:
        fail(e, e.code)
    except OSError as e:
        fail(f"{e}. Can --files be read and --out_dir be written?", 2)
    # These two end at once. A regular end waits for the pool, and that for the rest of what a
    # killed worker began to write; and Python may report a signal as its exit status.
    except BrokenProcessPool:
        print("fineweb.py: a worker died, out of memory? Lower --num_proc: the same command goes "
              "on", file=sys.stderr)
        os._exit(1)
    except KeyboardInterrupt:
        print("stopped: complete shards are kept, the same command goes on", flush=True)
        os._exit(0)

if __name__ == "__main__":
    main()
