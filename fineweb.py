"""
Text into token shards, once, so that training reads numbers and nothing else.

    python fineweb.py                                       FineWeb-Edu's 10 B token sample into edu_fineweb10B/
    python fineweb.py --streaming                           the same without a copy of the raw text on disk
    python fineweb.py --max_tokens 1e9                      the first tenth of it
    python fineweb.py --files "my/*.jsonl.gz" --out_dir my_shards --shard_size 1e6         your own text
    python fineweb.py --dataset wikimedia/wikipedia --name 20231101.de --out_dir wiki_de   any text data set of the Hub
    python fineweb.py --verify                              are the shards still what was written?

A shard is a .npy file of uint16: for each document <|endoftext|> and its tokens, one document after the other, cut
every --shard_size tokens. The first shard is the validation split. A run that was stopped or killed goes on after its
last complete shard when the same command is given again, and ends with the same bytes. Local files are parquet, JSON
lines (.jsonl, .json), both with the text under --text_key, or .txt, each of which is one document; .gz and .zst are
unpacked. Exit codes: 0 done, or stopped; 1 failed while running; 2 cannot be done as asked.

FineWeb-Edu: Penedo et al. 2024 (arXiv:2406.17557), huggingface.co/datasets/HuggingFaceFW/fineweb-edu.
"""
import argparse, collections, contextlib, glob, hashlib, io, itertools, json, multiprocessing
import os, re, shutil, signal, sys, threading
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

# Nothing comes from train_gpt2.py: with it, PyTorch would come into every worker process.
class UserError(ValueError):
    """What the user asked for cannot be. main() prints it as one line, with the remedy, and exits with 2."""

def require(condition, message):
    """An assert about what the user asked for: raises UserError, also under `python -O`."""
    if not condition:
        raise UserError(message)

# Reading --------------------------------------------------------------------------------------------------------------
# One process reads for all, so it does as little as it can: it hands on rows of parquet, lines of JSON and pieces of
# .txt as they are, in chunks.
CHUNK = 1_000_000          # bytes of text, about: some 80 ms of work for one process

class Chunk(NamedTuple):
    """What one process tokenizes at a time."""
    records: list          # rows (an Arrow array), lines of JSON (bytes), or one piece of a .txt (str)
    where: str             # what a message calls the first of them: this, and its number
    number: int
    begins: bool           # each record is a document; False: a further piece of the one before
    done: int              # how far the reading is: bytes of all files, or documents of the Hub

# Between anything and the space or line's end after it, one of GPT-2's words ends: a word may begin with a space, but
# it has none inside. This finds the last such place.
CUT = re.compile(r"(?s).*\S(?=[ \n])")

@contextlib.contextmanager
def unpacked(path):
    """A binary file, unpacked if its name says so, and a function that tells how many of its bytes have been read."""
    with open(path, "rb") as raw:
        if how := {".gz": "gzip", ".zst": "zstd"}.get(path.suffix):
            import pyarrow
            yield io.BufferedReader(pyarrow.CompressedInputStream(raw, how), 2**20), raw.tell
        else:
            yield raw, raw.tell

def arrow_chunks(arrays, where):
    """Join short Arrow arrays to arrays of about CHUNK bytes. Raises UserError if they are not text."""
    import pyarrow
    waiting, size = [], 0
    for array in arrays:
        require(re.fullmatch(r"null|(large_)?string(_view)?|dictionary<values=(large_)?string,.*", str(array.type)),
                f"{where}: it is no text, but of type {array.type}: see --text_key")
        array = array.cast(pyarrow.large_string())   # a copy of these rows alone, whatever they were a part of
        array.validate(full=True)                    # is it UTF-8?
        waiting, size = waiting + [array], size + array.nbytes
        if size >= CHUNK:
            yield pyarrow.concat_arrays(waiting)
            waiting, size = [], 0
    if waiting:
        yield pyarrow.concat_arrays(waiting)

def read_parquet(path, key):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        names, total, row = file.schema_arrow.names, file.metadata.num_rows, 0
        require(key in names, f"{path} has no column '{key}': --text_key can be {', '.join(names)}")
        for rows in arrow_chunks((batch.column(0) for batch in file.iter_batches(16, columns=[key])), f"{path}, {key}"):
            done = path.stat().st_size * (row + len(rows)) // total
            yield Chunk(rows, f"{path}, row", row + 1, True, done)
            row += len(rows)

def read_json_lines(path, key):
    with unpacked(path) as (file, read_so_far):
        number = 1
        while lines := file.readlines(CHUNK):
            yield Chunk(lines, f"{path}, line", number, True, read_so_far())
            number += len(lines)

def read_txt(path, key):
    """One document. A long one is cut where a word ends anyway: the tokens stay the same, and many processes share the
    work. Lines end with \\n, as whenever Python reads text."""
    with unpacked(path) as (file, read_so_far):
        text, rest, begins = io.TextIOWrapper(file, encoding="utf-8"), "", True
        while block := text.read(CHUNK):
            rest += block
            if cut := CUT.match(rest, max(len(rest) - len(block) - 1, 0)):  # only the new block can have such a place
                yield Chunk([rest[:cut.end()]], str(path), 1, begins, read_so_far())
                rest, begins = rest[cut.end():], False
        yield Chunk([rest], str(path), 1, begins, read_so_far())

READERS = {".parquet": read_parquet, ".jsonl": read_json_lines, ".json": read_json_lines, ".txt": read_txt}

@contextlib.contextmanager
def reading(path):
    """Any error in here is about this file."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as e:  # pyarrow's are of these kinds, and so is a wrong encoding
        raise UserError(f"cannot read {path}: {reason(e)}. Is it cut short, or of another kind?") from None

def read_files(files, key, skip):
    """Chunks of local files, in order, from the skip-th record on. Raises UserError if a file is not what it should."""
    before = 0
    for path in files:
        with reading(path):
            for chunk in READERS[kind(path)](path, key):
                if skip < len(chunk.records):
                    yield chunk._replace(records=chunk.records[skip:], number=chunk.number + skip,
                                         done=before + chunk.done)
                skip = max(skip - len(chunk.records), 0)
        before += path.stat().st_size

def kind(path):
    """The suffix that says what is in a file: .txt for a.txt.gz."""
    return (Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix).lower()

def find_files(patterns, out_dir):
    """The files that names or glob patterns stand for, each once, pattern by pattern in order of name; none of out_dir.
    Raises UserError."""
    files = {}
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        found = [p for p in map(Path, found) if p.is_file() and out_dir.resolve() not in p.resolve().parents]
        require(found, f"--files {pattern}: no such file (a folder? name its files: \"{Path(pattern) / '*.parquet'}\")")
        for path in found:
            files.setdefault(path.resolve(), path)
    files = list(files.values())
    for path in files:
        require(kind(path) in READERS and (kind(path) == path.suffix or kind(path) != ".parquet"),
                f"{path} is neither .parquet nor .jsonl, .json or .txt (these also with .gz or .zst)")
    return files

def text_bytes(files, key):
    """About how many bytes of text there are in local files."""
    total = 0
    for path in files:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            with reading(path):
                meta = pyarrow.parquet.read_metadata(path)
            for group in map(meta.row_group, range(meta.num_row_groups)):
                total += sum(group.column(i).total_uncompressed_size for i in range(group.num_columns)
                             if group.column(i).path_in_schema == key)
        else:
            total += path.stat().st_size * (3 if path.suffix in (".gz", ".zst") else 1)
    return total

def hub(load, args, **kwargs):
    """What a function of `datasets` loads of the data set asked for. That library downloads, tries again after a broken
    connection or too many requests (429), waiting longer each time, and keeps what it has. Raises UserError."""
    try:
        return load(args.dataset, args.name, **kwargs)
    except Exception as e:  # there is no end to what a network, the Hub and a data set's own files may raise
        raise UserError(f"cannot load {args.dataset}: {reason(e)}. Are --name and --split right? Without a network, "
                        f"--files takes local files") from None

def reason(e):
    return next(iter(str(e).splitlines()), "") or type(e).__name__

def read_hub(args, skip):
    """Chunks of a data set of the Hub, or of a folder that is like one, from the skip-th document on."""
    import datasets
    how = dict(streaming=True) if args.streaming else dict(num_proc=args.num_proc)
    data = hub(datasets.load_dataset, args, split=args.split, **how)
    names = data.column_names or list(hub(lambda *_: next(iter(data), {}), args))
    require(args.text_key in names, f"{args.dataset} has no '{args.text_key}': --text_key can be {', '.join(names)}")
    batches, done = data.select_columns([args.text_key]).with_format("arrow").skip(skip).iter(16), skip
    arrays = (batch[args.text_key].combine_chunks() for batch in batches)
    chunks = arrow_chunks(arrays, f"{args.dataset}, {args.text_key}")
    while True:
        try:
            rows = next(chunks, None)
        except UserError:
            raise
        except Exception as e:
            sys.exit(f"fineweb.py: {args.dataset} broke off: {reason(e)}. The same command goes on where it was")
        if rows is None:
            return
        done += len(rows)
        yield Chunk(rows, f"{args.dataset}, document", done - len(rows) + 1, True, done)

# Tokenizing -----------------------------------------------------------------------------------------------------------
def start_worker():
    """Ctrl-C is the parent's to handle. When that ends, for whatever reason, a thread that waits for it ends this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()

def text_of(record, key, where):
    """The text of a record, "" if it has none; None for an empty line. Raises UserError."""
    if isinstance(record, bytes):
        if record.isspace():
            return None
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where} is not JSON in UTF-8: {e}. Mend it or leave it out") from None
        require(isinstance(record, dict), f"{where} is no JSON object, such as {{\"{key}\": \"...\"}}, one a line")
        require(key in record, f"{where} has no '{key}': --text_key can be {', '.join(record) or 'nothing here'}")
        record = record[key]
    require(record is None or isinstance(record, str), f"{where}: '{key}' is no text but {type(record).__name__}")
    return record or ""

def tokenize(key, chunk):
    """The tokens of a chunk, (n,) uint16, and where in them each record ends, (records,) int64. A document begins with
    <|endoftext|>; in its text, that is text like any other. Raises UserError."""
    enc = tiktoken.get_encoding("gpt2")  # kept by tiktoken after the first time
    eot = np.array([enc.eot_token] if chunk.begins else [], dtype=np.uint32)
    parts, lengths = [eot[:0]], []
    for n, record in enumerate(chunk.records if isinstance(chunk.records, list) else chunk.records.to_pylist()):
        text, length = text_of(record, key, f"{chunk.where} {chunk.number + n}"), 0
        if text is not None:
            try:                         # as encode_ordinary() does it, but without a Python integer for each token
                tokens = enc.encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:   # a lone surrogate: that one knows what to do
                tokens = np.array(enc.encode_ordinary(text), dtype=np.uint32)
            parts += [eot, tokens]
            length = len(eot) + len(tokens)
        lengths.append(length)
    return np.concatenate(parts).astype(np.uint16), np.cumsum(lengths)

@contextlib.contextmanager
def ctrl_c_later():
    """What is started in here never hears of Ctrl-C; this process does, afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

def tokenized(pool, key, chunks, ahead):
    """How far the reading is, tokens and ends of each chunk, in order, although the workers finish in any order. As
    many as `ahead` are under way while the caller works."""
    waiting, workers = collections.deque(), set()
    for chunk in itertools.chain(chunks, [None] * ahead):
        if chunk is not None:
            with ctrl_c_later():
                waiting.append((chunk.done, pool.submit(tokenize, key, chunk)))
            workers.update(multiprocessing.active_children())
        if waiting and (chunk is None or len(waiting) > ahead):
            done, future = waiting.popleft()
            while not future.done():
                wait([future], timeout=1)
                if any(worker.exitcode is not None for worker in workers):  # the pool does not notice each such end
                    raise BrokenProcessPool
            yield done, *future.result()

# Writing --------------------------------------------------------------------------------------------------------------
def write_header(f, n):
    np.lib.format.write_array_header_1_0(f, {"descr": "<u2", "fortran_order": False, "shape": (n,)})

def to_disk(f, path):
    """Close f, and give it path's name once it is complete on the disk."""
    f.flush()
    os.fsync(f.fileno())
    f.close()
    os.replace(f.name, path)

def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def save_manifest(out_dir, manifest):
    f = open(out_dir / "manifest.tmp", "w")
    json.dump(manifest, f, indent=1)
    to_disk(f, out_dir / "manifest.json")

def load_manifest(out_dir):
    try:
        manifest = json.loads((out_dir / "manifest.json").read_text())
        if not isinstance(manifest, dict) or not {"complete", "shards"} <= manifest.keys():
            raise ValueError("no manifest of shards")
        return manifest
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {out_dir / 'manifest.json'}: {e}. Is that where shards were made?") from None

def open_manifest(out_dir, arguments):
    """The manifest of an earlier run with the same arguments, or a new one. Raises UserError if they were others."""
    if not (out_dir / "manifest.json").exists():
        there = [p.name for p in out_dir.glob("*") if p.suffix in (".npy", ".bin")]
        require(not there, f"{out_dir} has shards of another origin, {there[:1]}: choose another --out_dir")
        return {**arguments, "complete": False, "shards": []}
    manifest = load_manifest(out_dir)
    for key, now in arguments.items():
        require(manifest.get(key) == now, f"{out_dir} was made with other arguments: {key} was "
                f"{str(manifest.get(key)):.200}, is {str(now):.200}: choose another --out_dir")
    def there(shard):
        path = out_dir / shard["file"]
        return path.is_file() and path.stat().st_size == 128 + 2 * shard["tokens"]
    whole = list(itertools.takewhile(there, manifest["shards"]))  # what was deleted is made again, and all after it
    return manifest if whole == manifest["shards"] else {**manifest, "complete": False, "shards": whole}

def write_shards(out_dir, manifest, results, bar, total):
    """Write tokens into shards. With each that is complete, the manifest keeps where it ends: it has the first `token`
    tokens of record number `record`, and all before. total is how far the reading gets in the end, 0 if unknown."""
    size, shards, f = manifest["shard_size"], manifest["shards"], None
    room = manifest["max_tokens"] - sum(shard["tokens"] for shard in shards) if manifest["max_tokens"] else sys.maxsize
    record, begin = (shards[-1]["record"], shards[-1]["token"]) if shards else (0, 0)  # up to there all is written
    for done, tokens, ends in results:                         # of the records from `record` on
        while begin < len(tokens) and room:
            if f is None:
                name, filled = f"edufineweb_{'train' if shards else 'val'}_{len(shards):06d}.npy", 0
                f = open(out_dir / f"{name}.tmp", "wb")
                write_header(f, size)
            n = min(size - filled, room, len(tokens) - begin)
            f.write(tokens[begin:begin + n])
            begin, filled, room = begin + n, filled + n, room - n
            bar.update(n)
            nth = int(np.searchsorted(ends, begin))            # the record in the chunk that the last token belongs to
            place = dict(record=record + nth, token=begin - int(ends[nth - 1] if nth else 0))
            if filled == size:
                f = finish(f, out_dir, manifest, name, filled, place)
        record, begin = record + len(ends), 0
        if total and done:
            bar.total = bar.n + min(room, int(bar.n * (total - done) / done))
        if not room:
            break
    if f:
        finish(f, out_dir, manifest, name, filled, place)
    bar.total = bar.n
    manifest["complete"] = True
    save_manifest(out_dir, manifest)

def finish(f, out_dir, manifest, name, tokens, place):
    """A shard has all its tokens: to disk with it, and into the manifest."""
    f.seek(0)
    write_header(f, tokens)                                    # as long as before, whatever the number
    to_disk(f, out_dir / name)
    manifest["shards"].append(dict(file=name, tokens=tokens, sha256=sha256(out_dir / name), **place))
    save_manifest(out_dir, manifest)

def verify(out_dir):
    """Compare the shards with the manifest."""
    manifest = load_manifest(out_dir)
    bad = []
    for shard in tqdm(manifest["shards"], "verifying", disable=None):
        path = out_dir / shard["file"]
        if not path.is_file() or sha256(path) != shard["sha256"]:
            bad.append(shard["file"])
    if bad:
        sys.exit(f"fineweb.py: not as written: {', '.join(bad)}. Delete them: the command that made them does so again")
    print(f"{len(manifest['shards'])} shards, {sum(s['tokens'] for s in manifest['shards']):,} tokens, all as written"
          + ("" if manifest["complete"] else "; not complete: the command that made them goes on"))

# Command line ---------------------------------------------------------------------------------------------------------
def run(args):
    """Make the shards that args ask for, or what is missing of them. Raises UserError."""
    out_dir, files = Path(args.out_dir), find_files(args.files or [], Path(args.out_dir))
    source = {"files": [[path.name, path.stat().st_size] for path in files]} if files else {
        "dataset": args.dataset, "name": args.name, "split": args.split}
    manifest = open_manifest(out_dir, {**source, "text_key": args.text_key, "tokenizer": "gpt2",
                                       "shard_size": args.shard_size, "max_tokens": args.max_tokens})
    shards = manifest["shards"]
    tokens = sum(shard["tokens"] for shard in shards)
    if manifest["complete"]:
        return print(f"{out_dir} is complete: {len(shards)} shards, {tokens:,} tokens (--verify checks them)")
    try:
        tiktoken.get_encoding("gpt2")        # downloads 1.5 MB once, for all processes
    except (OSError, ValueError) as e:
        raise UserError(f"no GPT-2 vocabulary to be had ({type(e).__name__}): connect to the network once, or point "
                        f"TIKTOKEN_CACHE_DIR to a folder that has it") from None

    skip = shards[-1]["record"] if shards else 0
    if files:
        text, total = text_bytes(files, args.text_key), sum(path.stat().st_size for path in files)
        chunks = read_files(files, args.text_key, skip)
    else:
        import datasets
        split = (hub(datasets.load_dataset_builder, args).info.splits or {}).get(args.split)
        text, total = (split.num_bytes or 0, split.num_examples or 0) if split else (0, 0)  # 0: unknown
        chunks = read_hub(args, skip)
    # English has 4.5 bytes a token; other languages have fewer
    expected = max(min(int(text / 4.5), args.max_tokens or sys.maxsize), tokens)
    there = next(p for p in [out_dir, *out_dir.absolute().parents] if p.exists())
    need, free = 2 * (expected - tokens), shutil.disk_usage(there).free
    require(need < free, f"{out_dir} needs about {need / 1e9:.2f} GB more, the disk has {free / 1e9:.2f} GB free: make "
            f"room, or choose another --out_dir or a lower --max_tokens")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        save_manifest(out_dir, manifest)
    except OSError as e:
        raise UserError(f"cannot write to --out_dir {out_dir}: {e.strerror}") from None
    for cut_short in out_dir.glob("*.tmp"):  # by a kill
        cut_short.unlink()
    print(f"{f'{len(files)} files' if files else args.dataset} -> {out_dir} with {args.num_proc} processes"
          + (f", going on after {len(shards)} shards, {tokens:,} tokens" if shards else ""), flush=True)

    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # it tidies up after a kill
    context = multiprocessing.get_context("spawn")  # the same on every system
    pool = ProcessPoolExecutor(args.num_proc, context, start_worker)
    with tqdm(total=expected or None, initial=tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
        try:
            write_shards(out_dir, manifest, tokenized(pool, args.text_key, chunks, 4 * args.num_proc), bar, total)
        except KeyboardInterrupt:
            leave("stopped: complete shards are kept, the same command goes on", 0)
        except BrokenProcessPool:
            leave("fineweb.py: a worker died, out of memory? Lower --num_proc: the same command goes on", 1)
        finally:
            pool.shutdown(cancel_futures=True)
    require(shards, "no document in there")
    print(f"{out_dir}: {len(shards)} shards, {sum(s['tokens'] for s in shards):,} tokens"
          + ("" if len(shards) > 1 else ". All of it is in the validation split: for training too, lower --shard_size"))

def leave(message, code):
    """End at once. A regular end waits for the pool, and that for the rest of what a killed worker began to write."""
    for worker in multiprocessing.active_children():
        worker.kill()
    print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr if code else sys.stdout, flush=True)
    os._exit(code)

def count(text):
    """A number of things; 1e8 will do."""
    with contextlib.suppress(ValueError):
        if 1 <= float(text) < 2**63:
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")

def main():
    """Read the flags, do what they ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else min(os.cpu_count() or 1, 61)
    parser.add_argument("--dataset", default="HuggingFaceFW/fineweb-edu", help="data set of the Hub (%(default)s)")
    parser.add_argument("--name", help="its configuration (sample-10BT for FineWeb-Edu)")
    parser.add_argument("--split", default="train", help="its split (%(default)s)")
    parser.add_argument("--streaming", action="store_true", help="read it over the network, without a copy on disk")
    parser.add_argument("--files", nargs="+", metavar="GLOB", help="local files instead: parquet, jsonl, txt")
    parser.add_argument("--text_key", default="text", help="column or key that holds the text (%(default)s)")
    parser.add_argument("--out_dir", default="edu_fineweb10B", help="folder of the shards (%(default)s)")
    parser.add_argument("--shard_size", type=count, default=10**8, help="tokens in a shard (%(default)s)")
    parser.add_argument("--max_tokens", type=count, help="stop after so many (all)")
    parser.add_argument("--num_proc", type=count, default=cores, help="processes that tokenize (%(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare the shards with the manifest and exit")
    parser.error = lambda message: require(False, f"{message} (--help lists all flags)")  # and not argparse's usage
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        args = parser.parse_args()
        if args.dataset == "HuggingFaceFW/fineweb-edu" and args.name is None:
            args.name = "sample-10BT"
        verify(Path(args.out_dir)) if args.verify else run(args)
    except UserError as e:
        print(f"fineweb.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        leave("stopped: the same command goes on", 0)  # else Python may still report the signal as its exit status
    except OSError as e:
        sys.exit(f"fineweb.py: {e}. Complete shards are kept: make room, and the same command goes on")

if __name__ == "__main__":
    main()
