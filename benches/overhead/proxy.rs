//! The processes under measurement: a plain nginx, and Forebay as it is by default but for the access log, which is
//! off in both. Each is killed with its directory when dropped.

use std::fmt::Write as _;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::upstream::MODELS;
use crate::{machine, report};

/// A proxy that runs.
pub(crate) struct Proxy {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    child: Child,
    directory: TempDir,
}

impl Proxy {
    /// nginx with one process; `None` where there is none on this machine.
    pub(crate) fn nginx(upstream: SocketAddr) -> anyhow::Result<Option<Self>> {
        let Some(program) = machine::nginx() else { return Ok(None) };
        let (address, directory) = (free_address()?, tempfile::tempdir()?);
        let root = directory.path().display();
        // No master process: there is no other that could outlive the one that is killed at the end. Buffers hold the
        // longest body, so that none goes to a file; connections are never closed for their age, as Forebay's are not.
        let config = format!(
            "daemon off; master_process off; worker_processes 1; pid {root}/pid; error_log {root}/log warn;
             events {{ worker_connections 4096; }}
             http {{
                 access_log off; keepalive_requests 1000000000; client_body_buffer_size 64k; tcp_nodelay on;
                 client_body_temp_path {root}/body; proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/fastcgi;
                 uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
                 upstream worker {{ server {upstream}; keepalive 256; keepalive_requests 1000000000; }}
                 server {{
                     listen {address};
                     location / {{
                         proxy_pass http://worker; proxy_http_version 1.1; proxy_set_header Connection \"\";
                         proxy_buffering off;
                     }}
                 }}
             }}"
        );
        let file = directory.path().join("nginx.conf");
        std::fs::write(&file, config)?;
        let mut command = machine::pinned(machine::PROXY_CORE, &program);
        command.arg("-c").arg(&file).arg("-e").arg(directory.path().join("log"));
        Self::start(report::NGINX, command, address, directory).map(Some)
    }

    /// Forebay with both models of the upstream: one counted with the tokenizer that ships with the simulated engine,
    /// one whose engine it does not know and whose prompts' lengths it guesses, at each of the `upstreams`.
    /// `command` is what starts the program, by itself or under another.
    pub(crate) fn forebay(name: &str, mut command: Command, upstreams: &[SocketAddr]) -> anyhow::Result<Self> {
        let first = upstreams.first().context("no upstream")?;
        let (address, ops_address, directory) = (free_address()?, free_address()?, tempfile::tempdir()?);
        let [counted, guessed] = MODELS;
        let mut config = String::new();
        write!(
            config,
            "[server]\nlisten = '{address}'\nops_listen = '{ops_address}'\ndata_dir = '{}'\naccess_log = false\n\
             [[model]]\nname = '{counted}'\ntokenizer = '{}/backends/simulated-engine/model'\n\
             [[model.worker]]\nname = 'vllm'\nurl = 'http://{first}'\nmodel = '{counted}'\n\
             [[model]]\nname = '{guessed}'\n",
            directory.path().display(),
            env!("CARGO_MANIFEST_DIR"),
        )?;
        for upstream in upstreams {
            let name = format!("name = 'unknown {upstream}'\nurl = 'http://{upstream}'");
            writeln!(config, "[[model.worker]]\n{name}\nmodel = '{guessed}'\nengine = 'openai'")?;
        }
        let file = directory.path().join("forebay.toml");
        std::fs::write(&file, config)?;
        command.arg("serve").arg("--config").arg(&file);
        Self::start(name, command, address, directory)
    }

    fn start(name: &str, mut command: Command, address: SocketAddr, directory: TempDir) -> anyhow::Result<Self> {
        let log = File::create(directory.path().join("stderr"))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let child = child.with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { name: name.to_owned(), address, child, directory })
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard error, for when it does not do what it should.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default()
    }

    /// Asks until `ask` is answered, for at most a minute: a program that is counted step by step starts slowly.
    pub(crate) async fn ready(&mut self, ask: impl AsyncFn() -> anyhow::Result<()>) -> anyhow::Result<()> {
        const ATTEMPTS: u32 = 1200;
        const PAUSE: Duration = Duration::from_millis(50);
        let mut attempt = 1;
        while let Err(error) = ask().await {
            ensure!(attempt < ATTEMPTS, "a proxy does not answer: {error:#}\n{}", self.log());
            let ended = self.child.try_wait()?;
            ensure!(ended.is_none(), "a proxy ended by itself: {ended:?}\n{}", self.log());
            attempt += 1;
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address that nobody listens on now.
fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}
