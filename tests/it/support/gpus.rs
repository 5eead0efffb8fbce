//! GPUs that are not there: a stand-in for the driver's library, and agents that read it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use forebay_backends::signals::gpu::wire::telemetry_client::TelemetryClient;
use forebay_backends::signals::gpu::wire::{Gpu, Snapshot, WatchRequest};

use super::PATIENCE;
use super::process::Process;

/// What the stand-in reads; see its source.
pub(crate) struct StandIn {
    directory: tempfile::TempDir,
    values: Mutex<BTreeMap<String, String>>,
}

impl StandIn {
    /// So many GPUs that are well and do nothing.
    pub(crate) fn new(gpus: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let stand_in = Self { directory, values: Mutex::default() };
        stand_in.set("driver", "570.1");
        for gpu in 0..gpus {
            let well = [
                ("uuid", format!("GPU-{gpu}")),
                ("name", "Stand-in".to_owned()),
                ("memory.total", (80_u64 << 30).to_string()),
                ("memory.used", (1_u64 << 30).to_string()),
                ("utilization", "0".to_owned()),
                ("temperature", "40".to_owned()),
                ("temperature.slowdown", "90".to_owned()),
                ("power", "100000".to_owned()),
                ("power.limit", "700000".to_owned()),
                ("clock", "2000".to_owned()),
                ("clock.max", "2000".to_owned()),
                ("throttle", "0".to_owned()),
                ("processes", String::new()),
            ];
            for (key, value) in well {
                stand_in.set(&format!("{gpu}.{key}"), &value);
            }
        }
        stand_in.set("gpus", &gpus.to_string());
        stand_in
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("gpus")
    }

    pub(crate) fn set(&self, key: &str, value: &str) {
        self.values.lock().unwrap().insert(key.to_owned(), value.to_owned());
        self.write();
    }

    pub(crate) fn unset(&self, key: &str) {
        self.values.lock().unwrap().remove(key);
        self.write();
    }

    /// Whole or not at all: it is read at any moment.
    fn write(&self) {
        let text: String = self.values.lock().unwrap().iter().map(|(key, value)| format!("{key} {value}\n")).collect();
        let fresh = self.directory.path().join("fresh");
        std::fs::write(&fresh, text).expect("the file is written");
        std::fs::rename(fresh, self.file()).expect("the file is written");
    }

    /// What a process needs to read it.
    pub(crate) fn environment(&self, library: &Path) -> [(&'static str, String); 2] {
        let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        [("STAND_IN_NVML", text(&self.file())), ("FOREBAY_NVML_LIBRARY", text(library))]
    }
}

/// The stand-in, compiled once for each set of flags.
pub(crate) fn library(flags: &'static [&str]) -> &'static Path {
    static BUILT: OnceLock<Mutex<BTreeMap<&[&str], &Path>>> = OnceLock::new();
    let mut built = BUILT.get_or_init(Mutex::default).lock().unwrap();
    built.entry(flags).or_insert_with(|| {
        let name = format!("stand-in-nvml-{}{}.so", std::process::id(), flags.concat());
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/stand_in_nvml.c");
        let status = Command::new("cc").args(flags).args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
        assert!(status.expect("a C compiler").success());
        Box::leak(library.into_boxed_path())
    })
}

/// Files with a certificate of `localhost` and with its key.
pub(crate) fn identity(directory: &Path) -> [String; 2] {
    let identity = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let (certificate, key) = (identity.cert.der().to_vec(), identity.signing_key.serialize_der());
    [("CERTIFICATE", certificate), ("PRIVATE KEY", key)].map(|(what, der)| {
        let path = directory.join(what);
        let text = format!("-----BEGIN {what}-----\n{}\n-----END {what}-----\n", BASE64_STANDARD.encode(der));
        std::fs::write(&path, text).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    })
}

/// A running `forebay agent` over a stand-in.
pub(crate) struct Agent {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
    pub(crate) gpus: StandIn,
}

impl Agent {
    pub(crate) fn start(gpus: usize) -> Self {
        Self::over(StandIn::new(gpus), library(&[]), "127.0.0.1:0", &[])
    }

    pub(crate) fn over(gpus: StandIn, library: &Path, listen: &str, flags: &[&str]) -> Self {
        let environment = gpus.environment(library);
        let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
        let arguments = [&["agent", "--listen", listen], flags].concat();
        let mut process = Process::start(&arguments, gpus.directory.path(), &environment);
        let address = process.line(|line| line.split("://").nth(1)?.trim().parse().ok());
        Self { process, address, gpus }
    }

    pub(crate) fn watch(&self) -> Watcher {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let url = format!("http://{}", self.address);
        let stream = runtime.block_on(async {
            let mut client = TelemetryClient::connect(url).await.expect("the agent listens");
            client.watch(WatchRequest {}).await.expect("a stream").into_inner()
        });
        Watcher { runtime, next: Box::new(stream) }
    }
}

/// The stream of an agent's snapshots.
pub(crate) struct Watcher {
    runtime: tokio::runtime::Runtime,
    next: Box<tonic::Streaming<Snapshot>>,
}

impl Watcher {
    /// The next snapshot; `None` when the stream ended.
    pub(crate) fn next(&mut self) -> Option<Snapshot> {
        let next = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, self.next.message()).await });
        next.expect("the agent speaks").ok().flatten()
    }

    /// The first snapshot that `pick` takes.
    pub(crate) fn until<T>(&mut self, what: &str, pick: impl Fn(&Snapshot) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            let snapshot = self.next().expect("the stream goes on");
            if let Some(found) = pick(&snapshot) {
                return found;
            }
            assert!(began.elapsed() < PATIENCE, "waited for {what}; the last was {snapshot:?}");
        }
    }

    /// The first snapshot in which this GPU is as `pick` wants it.
    pub(crate) fn gpu(&mut self, at: usize, what: &str, pick: impl Fn(&Gpu) -> bool) -> Gpu {
        self.until(what, |snapshot| snapshot.gpus.get(at).filter(|gpu| pick(gpu)).cloned())
    }
}
