//! The append-only file of rows, written by one thread.
//!
//! Each start begins a new file `usage-<unix ms>.jsonl`; each file is closed at [`FILE_BYTES_MAX`]. A batch of rows
//! is one `write`, so that a process that is killed loses at most what it had not been handed, and a torn last line
//! can only be the very end of a file. Rows are flushed to the disk itself once a second. When the disk refuses, the
//! batch is tried again until it takes it; meanwhile the bounded channel fills and new requests are refused.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam::channel::{Receiver, Sender, bounded};
use tokio::sync::mpsc;

use super::row::Row;

/// Rows written at once.
const BATCH_ROWS_MAX: usize = 512;
/// A journal file is closed beyond this size.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Pause after each write, in which rows gather: a row after a pause is written at once, and under load a write takes
/// many. Waking the thread for each row costs more than writing it; a process that is killed loses at most as much more.
const GATHER_INTERVAL: Duration = Duration::from_millis(5);
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Batches that may wait for a slow reader of the access log.
const ACCESS_BATCHES_MAX: usize = 64;
/// Time for its last lines at the end; whoever reads it may have stopped to.
const ACCESS_LAST_LINES: Duration = Duration::from_secs(1);

/// The writing thread; [`Journal::close`] waits for the last row.
#[derive(Debug)]
pub struct Journal {
    thread: JoinHandle<()>,
}

impl Journal {
    pub(super) fn start(directory: &Path, access_log: bool, rows: mpsc::Receiver<Row>) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let files = Files::open(directory)?;
        let access = if access_log { Some(AccessLog::start()?) } else { None };
        let thread = std::thread::Builder::new().name("journal".into()).spawn(move || write(rows, files, access))?;
        Ok(Self { thread })
    }

    /// Waits until every row is on disk. All [`super::Ledger`]s and entries must be dropped by then or soon.
    pub fn close(self) {
        if self.thread.join().is_err() {
            tracing::error!("the journal's thread panicked, rows may be missing");
        }
    }
}

fn write(mut rows: mpsc::Receiver<Row>, mut files: Files, access: Option<AccessLog>) {
    let mut batch = Vec::with_capacity(BATCH_ROWS_MAX);
    let mut lines = Vec::new();
    loop {
        let taken = rows.blocking_recv_many(&mut batch, BATCH_ROWS_MAX);
        if taken == 0 {
            break;
        }
        lines.clear();
        batch.drain(..).for_each(|row| row.write(&mut lines));
        files.append(&lines);
        if let Some(access) = &access {
            access.write(&lines);
        }
        if taken < BATCH_ROWS_MAX {
            std::thread::sleep(GATHER_INTERVAL);
        }
    }
    files.flush();
    if let Some(access) = access {
        access.close();
    }
}

/// The rows on standard output, by a thread of its own: it never holds up the journal.
struct AccessLog {
    batches: Sender<Vec<u8>>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

impl AccessLog {
    fn start() -> std::io::Result<Self> {
        let (batches, to_write) = bounded::<Vec<u8>>(ACCESS_BATCHES_MAX);
        let (ending, ended) = bounded(0);
        std::thread::Builder::new().name("access-log".into()).spawn(move || {
            let _ending: Sender<()> = ending;
            for lines in to_write {
                if std::io::stdout().write_all(&lines).and_then(|()| std::io::stdout().flush()).is_err() {
                    return; // nobody reads standard output any more
                }
            }
        })?;
        Ok(Self { batches, ended })
    }

    /// Lines for which there is no room are dropped.
    fn write(&self, lines: &[u8]) {
        let _ = self.batches.try_send(lines.to_vec());
    }

    fn close(self) {
        drop(self.batches);
        let _ = self.ended.recv_timeout(ACCESS_LAST_LINES);
    }
}

struct Files {
    directory: PathBuf,
    file: File,
    bytes: u64,
    flushed: Instant,
}

impl Files {
    fn open(directory: &Path) -> std::io::Result<Self> {
        let file = next_file(directory)?;
        Ok(Self { directory: directory.to_owned(), file, bytes: 0, flushed: Instant::now() })
    }

    fn append(&mut self, lines: &[u8]) {
        let mut rest = lines;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, directory = %self.directory.display(), "the usage journal cannot be written, trying again");
                    std::thread::sleep(RETRY_INTERVAL);
                }
            }
        }
        self.bytes += lines.len() as u64;
        if self.flushed.elapsed() >= FLUSH_INTERVAL {
            self.flush();
        }
        if self.bytes >= FILE_BYTES_MAX {
            self.flush();
            match next_file(&self.directory) {
                Ok(file) => (self.file, self.bytes) = (file, 0),
                Err(error) => tracing::error!(%error, "cannot begin a new journal file, staying with the old one"),
            }
        }
    }

    fn flush(&mut self) {
        if let Err(error) = self.file.sync_data() {
            tracing::error!(%error, "the usage journal could not be flushed to disk");
        }
        self.flushed = Instant::now();
    }
}

/// Makes a file that no other start or file of this process has, named by the time.
fn next_file(directory: &Path) -> std::io::Result<File> {
    let mut stamp = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis());
    loop {
        let path = directory.join(format!("usage-{stamp}.jsonl"));
        match OpenOptions::new().append(true).create_new(true).open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => stamp += 1,
            other => return other,
        }
    }
}
