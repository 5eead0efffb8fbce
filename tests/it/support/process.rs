//! Processes under test: started on free ports, killed when the test ends.

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::client::{self, Answer};
use super::{PATIENCE, eventually};

/// A running `forebay`.
pub(crate) struct Process {
    child: Child,
    lines: Receiver<String>,
    /// What follows its output.
    readers: Vec<JoinHandle<()>>,
    /// Everything it wrote to standard output until now.
    pub(crate) stdout: Arc<Mutex<String>>,
    /// Everything it wrote to standard error until now.
    pub(crate) stderr: Arc<Mutex<String>>,
}

impl Process {
    pub(crate) fn start(arguments: &[&str], directory: &Path, environment: &[(&str, &str)]) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_forebay")), arguments, directory, environment)
    }

    /// The same by a command that becomes `forebay`.
    fn start_by(mut command: Command, arguments: &[&str], directory: &Path, environment: &[(&str, &str)]) -> Self {
        command.args(arguments).current_dir(directory).env_clear();
        for name in ["PATH", "HOME"] {
            command.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        command.envs(environment.iter().copied());
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("forebay starts");
        let (sender, lines) = channel();
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let out = follow(child.stdout.take().expect("piped"), &stdout, Some(sender));
        let err = follow(child.stderr.take().expect("piped"), &stderr, None);
        Self { child, lines, readers: vec![out, err], stdout, stderr }
    }

    /// The next line of standard output that `pick` takes.
    pub(crate) fn line<T>(&mut self, pick: impl Fn(&str) -> Option<T>) -> T {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => {
                    if let Some(found) = pick(&line) {
                        return found;
                    }
                }
                Err(_) => panic!("the line never came; stdout: {}\nstderr: {}", self.out(), self.err()),
            }
        }
    }

    pub(crate) fn out(&self) -> String {
        self.stdout.lock().unwrap().clone()
    }

    pub(crate) fn err(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Sends a signal by name (`TERM`, `HUP`, `KILL`).
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(status.expect("kill runs").success());
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("waiting works")
    }

    /// Waits for the end; then all that it wrote has been read.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let status = eventually("the process to end", || self.exited());
        self.readers.drain(..).for_each(|reader| reader.join().expect("a reader"));
        status
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Keeps every line of `pipe` in `all`, and hands it on.
fn follow(pipe: impl Read + Send + 'static, all: &Arc<Mutex<String>>, lines: Option<Sender<String>>) -> JoinHandle<()> {
    let all = Arc::clone(all);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let mut text = all.lock().unwrap();
            text.push_str(&line);
            text.push('\n');
            if let Some(lines) = &lines {
                let _ = lines.send(line);
            }
        }
    })
}

/// Runs `forebay` to its end: exit code, standard output, standard error.
pub(crate) fn run(arguments: &[&str], directory: &Path, environment: &[(&str, &str)]) -> (i32, String, String) {
    let mut process = Process::start(arguments, directory, environment);
    let status = process.wait();
    (status.code().unwrap_or(-1), process.out(), process.err())
}

/// A simulated engine in a process of its own.
pub(crate) struct Worker {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Worker {
    /// Started with these flags on top of a free port and a speed at which tests do not wait.
    pub(crate) fn start(flags: &[&str]) -> Self {
        Self::start_at(0, flags)
    }

    /// The same at a port that was another's.
    pub(crate) fn start_at(port: u16, flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let port = port.to_string();
        let mut arguments = vec!["simulated-worker", "--port", &port];
        if !flags.contains(&"--speed") {
            arguments.extend(["--speed", "50"]);
        }
        arguments.extend(flags);
        let mut process = Process::start(&arguments, directory.path(), &[]);
        let address = process.line(|line| line.split("http://").nth(1)?.trim().parse().ok());
        Self { process, address, _directory: directory }
    }

    /// Sets what goes wrong from now on: a JSON array of faults.
    pub(crate) fn faults(&self, json: &str) {
        self.change(&format!("{{\"faults\":{json}}}"));
    }

    /// Runs so many times faster than its timing model from now on.
    pub(crate) fn speed(&self, speed: f64) {
        self.change(&format!("{{\"speed\":{speed}}}"));
    }

    /// Closes its listener and every connection for so long; returns once nobody gets in any more.
    pub(crate) fn refuse(&self, milliseconds: u32) {
        self.change(&format!("{{\"refuse_ms\":{milliseconds}}}"));
        eventually("the worker to refuse", || TcpStream::connect(self.address).is_err().then_some(()));
    }

    fn change(&self, json: &str) {
        let answer = client::post(self.address, "/simulated/faults", json);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }

    /// The value of one series of `/metrics`, by the start of its line.
    pub(crate) fn metric(&self, start: &str) -> f64 {
        metric(&client::get(self.address, "/metrics").text(), start)
    }

    /// What it saw and did since its start.
    pub(crate) fn log(&self) -> serde_json::Value {
        client::get(self.address, "/simulated/log").json()
    }

    /// Sequences that ran to their end.
    pub(crate) fn finished(&self) -> u64 {
        self.log()["sequences"]["finished"].as_u64().expect("a count")
    }
}

/// A gateway in a process of its own.
pub(crate) struct Gateway {
    pub(crate) process: Process,
    pub(crate) client: SocketAddr,
    pub(crate) ops: SocketAddr,
    pub(crate) directory: tempfile::TempDir,
}

impl Gateway {
    /// Serves these models: TOML after the `[server]` table, which is made here. Returns when it is ready.
    pub(crate) fn start(models: &str) -> Self {
        let gateway = Self::start_unready("", models, &[]);
        gateway.until_ready();
        gateway
    }

    /// As [`Gateway::start`], with more keys for `[server]` and variables, and no wait for a worker to be up.
    pub(crate) fn start_unready(server: &str, models: &str, environment: &[(&str, &str)]) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_forebay")), server, models, environment)
    }

    /// As [`Gateway::start`], where names lead to what stands in this file: its own `/etc/hosts`. Needs the rights to make a
    /// mount namespace; nothing without them.
    pub(crate) fn start_with_hosts(hosts: &Path, models: &str) -> Option<Self> {
        let own = |command: &mut Command| {
            let mounts = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";
            command.args(["--mount", "sh", "-c", mounts, "sh"]).arg(hosts);
        };
        let mut attempt = Command::new("unshare");
        own(&mut attempt);
        if !attempt.arg("true").stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            return None;
        }
        let mut command = Command::new("unshare");
        own(&mut command);
        command.arg(env!("CARGO_BIN_EXE_forebay"));
        let gateway = Self::start_by(command, "", models, &[]);
        gateway.until_ready();
        Some(gateway)
    }

    fn start_by(command: Command, server: &str, models: &str, environment: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("forebay.toml");
        std::fs::write(&file, configuration(server, models)).expect("the file is written");
        let file = file.to_str().expect("UTF-8");
        let mut process = Process::start_by(command, &["serve", "--config", file], directory.path(), environment);
        let (client, ops) = process.line(|line| {
            let mut addresses = line.split("http://").skip(1).map(|part| part.split_whitespace().next());
            Some((addresses.next()??.parse().ok()?, addresses.next()??.parse().ok()?))
        });
        Self { process, client, ops, directory }
    }

    /// One model `m` on these workers, counted with the tokenizer of the simulated engine.
    pub(crate) fn before(workers: &[SocketAddr]) -> Self {
        Self::start(&model("m", workers, &format!("tokenizer = {:?}\n", tokenizer())))
    }

    pub(crate) fn until_ready(&self) {
        eventually("a worker to be up", || (client::get(self.ops, "/readyz").status == 200).then_some(()));
    }

    /// Writes the configuration anew; the gateway sees it within a second, or at once on SIGHUP.
    pub(crate) fn configure(&self, server: &str, models: &str) {
        let file = self.directory.path().join("forebay.toml");
        std::fs::write(file, configuration(server, models)).expect("the file is written");
    }

    pub(crate) fn metric(&self, start: &str) -> f64 {
        metric(&client::get(self.ops, "/metrics").text(), start)
    }

    /// The journal's files, oldest first.
    pub(crate) fn journal(&self) -> Vec<String> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(self.directory.path().join("data/journal"))
            .expect("the journal's directory")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        files.sort();
        files.into_iter().map(|file| std::fs::read_to_string(file).expect("a journal file")).collect()
    }

    /// All rows of the journal, oldest first.
    pub(crate) fn rows(&self) -> Vec<serde_json::Value> {
        let read = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("a row");
        // A reader may meet a batch of rows half-way.
        let written = |file: &String| file[..file.rfind('\n').unwrap_or(0)].lines().map(read).collect::<Vec<_>>();
        self.journal().iter().flat_map(written).collect()
    }

    /// The row of the request with this `x-request-id`, as soon as it is there.
    pub(crate) fn row(&self, request: &str) -> serde_json::Value {
        eventually("a row in the journal", || self.rows().into_iter().find(|row| row["request"] == request))
    }

    pub(crate) fn post(&self, path: &str, body: &str) -> Answer {
        client::post(self.client, path, body)
    }

    /// The row of this answer's request.
    pub(crate) fn row_of(&self, answer: &Answer) -> serde_json::Value {
        self.row(answer.header("x-request-id").expect("every answer is named"))
    }

    /// Asks for a path under `/admin/v1/` as the owner.
    pub(crate) fn admin(&self, path: &str) -> Answer {
        let key = format!("authorization: Bearer {}", self.owner_key());
        client::get_with(self.ops, &format!("/admin/v1/{path}"), &[&key])
    }

    /// Asks for a change under `/admin/v1/` as the owner.
    pub(crate) fn order(&self, method: &str, path: &str, body: &str) -> Answer {
        client::order(self.ops, &self.owner_key(), method, path, body)
    }

    /// The key that stands in its data directory.
    pub(crate) fn owner_key(&self) -> String {
        let file = self.directory.path().join("data/owner.key");
        std::fs::read_to_string(file).expect("the owner's key").trim().to_owned()
    }

    /// Requests that wait in lanes.
    pub(crate) fn queued(&self) -> f64 {
        let text = client::get(self.ops, "/metrics").text();
        let lines = text.lines().filter(|line| line.starts_with("forebay_queue_depth{"));
        lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).expect("a value")).sum()
    }

    pub(crate) fn until_queued(&self, count: usize) {
        eventually("requests to wait in lanes", || (self.queued() as usize == count).then_some(()));
    }
}

fn configuration(server: &str, models: &str) -> String {
    format!("[server]\nlisten = \"127.0.0.1:0\"\nops_listen = \"127.0.0.1:0\"\ndata_dir = \"data\"\n{server}\n{models}")
}

/// TOML of one model on these workers, which are named `w0`, `w1`, …; `extra` are more keys of the model.
pub(crate) fn model(name: &str, workers: &[SocketAddr], extra: &str) -> String {
    let mut text = format!("[[model]]\nname = {name:?}\n{extra}\n");
    for (index, address) in workers.iter().enumerate() {
        text += &format!("[[model.worker]]\nname = \"w{index}\"\nurl = \"http://{address}\"\n");
    }
    text
}

/// The directory of the simulated engine's own tokenizer.
pub(crate) fn tokenizer() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("backends/simulated-engine/model")
}

/// The value of the series whose line begins so; 0 when there is none.
pub(crate) fn metric(text: &str, start: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(start));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
}
