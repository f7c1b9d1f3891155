"""Download and unpack archives so that nothing is ever half done.

Pooch decides whether a file has to be downloaded, checks its sum and puts it in its place. It cannot resume:
it starts every attempt in a new temporary file and overwrites a file that it finds with another sum. Hence
the downloader below, which grows a `.part` file across attempts, hosts and runs, and a refusal to overwrite.
"""

import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from ssepa_lib.errors import UserError

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all (None: unknown)
DAMAGED = (tarfile.ReadError, EOFError, zlib.error, OSError)  # what reading a damaged archive raises
_TIMEOUT = 30  # seconds without a byte
_ATTEMPTS = 3  # per host
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Source:
    """A file to download: the hosts are tried in order, the MD5 sum decides."""

    file: str
    md5: str
    urls: tuple[str, ...]


def fetch(source: Source, folder: Path, progress: Progress | None = None) -> Path:
    """Download a file unless it lies in `folder` already; an interrupted download is resumed.

    Raises:
        UserError: no host delivered the file, or the file on the disk is another one.
    """
    import pooch  # here, because nothing but a download needs it

    target = folder / source.file
    if target.is_file():
        if pooch.file_hash(target, "md5") != source.md5:
            raise UserError(
                f"{target}: wrong MD5 sum (expected {source.md5}); delete the file and run again."
            )
        return target
    pooch.get_logger().setLevel("WARNING")
    download = _ResumingDownload(folder / f"{source.file}.part", progress)
    failures = []
    for url in source.urls:
        for _ in range(_ATTEMPTS):
            before = download.size
            try:
                pooch.retrieve(url, f"md5:{source.md5}", source.file, folder, downloader=download)
                return target
            except ValueError:  # pooch's only word for another sum; what was downloaded is gone
                failures.append(f"{urlsplit(url).netloc}: wrong MD5 sum")
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{urlsplit(url).netloc}: {getattr(error, 'reason', None) or error}")
            if download.size == before:  # neither new bytes nor a wrong beginning thrown away
                break
    reasons = "; ".join(dict.fromkeys(failures))
    raise UserError(
        f"{source.file} could not be downloaded ({reasons}); run again later, or put the file at {target}."
    )


class _StayEncrypted(urllib.request.HTTPRedirectHandler):
    """Follows no redirection from an encrypted address to an unencrypted one."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise OSError(f"redirects to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_StayEncrypted)


@dataclass
class _ResumingDownload:
    """Downloader for pooch that continues the file `part` and hands it over when it is complete."""

    part: Path
    progress: Progress | None

    @property
    def size(self) -> int:
        """Bytes of an earlier attempt."""
        return self.part.stat().st_size if self.part.is_file() else 0

    def __call__(self, url: str, output_file: str, _: object) -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "ssepa-workbook"})
        if self.size:
            request.add_header("Range", f"bytes={self.size}-")
        try:
            with _OPENER.open(request, timeout=_TIMEOUT) as response:
                self._save(response)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not self.size:  # 416: nothing is left to send, the sum will tell
                raise
        self.part.replace(output_file)

    def _save(self, response: http.client.HTTPResponse) -> None:
        done = self.size if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        chunk = response.read(_CHUNK)
        page = done == 0 and chunk.lstrip()[:5].lower() in (b"<!doc", b"<html")
        if page or "html" in response.headers.get("Content-Type", ""):
            raise OSError("answered with a web page instead of the file")
        with self.part.open("ab" if done else "wb") as file:
            while chunk:
                file.write(chunk)
                done += len(chunk)
                if self.progress:
                    self.progress(done, total)
                chunk = response.read(_CHUNK)
        if total is not None and done < total:
            raise OSError(f"connection lost after {done} of {total} bytes")


def members(tar: tarfile.TarFile, raw: BinaryIO, progress: Progress | None) -> Iterator[tarfile.TarInfo]:
    """The members of a tar archive, one after the other, with progress by the bytes of its file `raw`."""
    size = os.fstat(raw.fileno()).st_size
    for member in tar:
        yield member
        if progress:
            progress(min(raw.tell(), size - 1), size)  # what has been read ahead is not done
    if progress:
        progress(size, size)


def unpack(archive: Path, inner: str, target: Path, progress: Progress | None = None) -> None:
    """Unpack the folder `inner` of a tar archive to `target`, which appears complete or not at all.

    Args:
        progress: called with (bytes of the archive read, all).

    Raises:
        UserError: a damaged archive, one without `inner`, one with paths that leave the folder, or `target`
            exists.
    """
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} exists but is incomplete; move it away and run again.")
    temporary = target.with_name(f"{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with archive.open("rb") as raw, tarfile.open(fileobj=raw) as tar:
            tar.extractall(temporary, members(tar, raw, progress), filter="data")
        if not (temporary / inner).is_dir():
            raise UserError(f"{archive}: there is no {inner} in this archive; delete it and download again.")
        if target.is_dir():
            target.rmdir()
        (temporary / inner).rename(target)
    except tarfile.FilterError as error:
        raise UserError(
            f"{archive}: unsafe archive, nothing was unpacked ({error}); get it from the source."
        ) from error
    except DAMAGED as error:
        raise UserError(
            f"{archive}: could not be unpacked ({error}); check the disk or download it again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
