//! This machine: its cores, its nginx, and what a process has used of it (Linux's `/proc`).

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

/// Where the proxies run, one under load at a time.
pub(crate) const PROXY_CORE: &str = "0";
/// Where clients and upstream run.
const LOAD_CORE: &str = "1";

/// Keeps this process, whose threads are still to come, off the proxies' core. False where that cannot be.
pub(crate) fn pin_this_process() -> bool {
    can_pin() && {
        let mut taskset = Command::new("taskset");
        taskset.args(["-pc", LOAD_CORE, &std::process::id().to_string()]).stdout(Stdio::null());
        taskset.status().is_ok_and(|status| status.success())
    }
}

/// A command that runs on `core` alone, where that can be.
pub(crate) fn pinned(core: &str, program: &Path) -> Command {
    if !can_pin() {
        return Command::new(program);
    }
    let mut command = Command::new("taskset");
    command.args(["-c", core]).arg(program);
    command
}

fn can_pin() -> bool {
    let cores = std::fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
    let cores =
        cores.filter(|entry| [PROXY_CORE, LOAD_CORE].iter().any(|core| entry.file_name() == *format!("cpu{core}")));
    cores.count() == 2 && on_path("taskset").is_some()
}

/// nginx, installed first where this machine has none and may install it (Debian, as root).
pub(crate) fn nginx() -> Option<PathBuf> {
    on_path("nginx").or_else(|| {
        let mut install = Command::new("apt-get");
        install.args(["install", "--yes", "--no-install-recommends", "nginx-light"]);
        let _ = install.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        on_path("nginx")
    })
}

pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps servers where an ordinary user's path does not lead.
    let directories = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    directories.map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// CPU time, user and system, that each thread of a process had at one moment. From the scheduler's own account in
/// nanoseconds, since `utime` and `stime` count in hundredths of a second.
pub(crate) struct CpuTime(HashMap<OsString, Duration>);

impl CpuTime {
    pub(crate) fn of(process: u32) -> anyhow::Result<Self> {
        let mut threads = HashMap::new();
        for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
            let thread = thread?;
            // A thread may have ended since the directory was read.
            let Ok(account) = std::fs::read_to_string(thread.path().join("schedstat")) else { continue };
            let on_cpu = account.split(' ').next().and_then(|ns| ns.parse().ok());
            let on_cpu = on_cpu.context("the kernel keeps no account of a thread's CPU time")?;
            threads.insert(thread.file_name(), Duration::from_nanos(on_cpu));
        }
        Ok(Self(threads))
    }

    /// What the threads that still live have used since `earlier`. Idle ones of a pool may have ended in between.
    pub(crate) fn since(&self, earlier: &Self) -> Duration {
        let before = |thread| earlier.0.get(thread).copied().unwrap_or_default();
        self.0.iter().map(|(thread, now)| now.saturating_sub(before(thread))).sum()
    }
}

/// Files that a process started here may have open.
pub(crate) fn files_max() -> anyhow::Result<u32> {
    let limits = std::fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next());
    let soft = soft.context("the kernel does not tell the limit of open files")?;
    Ok(soft.parse().unwrap_or(u32::MAX)) // "unlimited"
}

/// Resident memory in MiB.
pub(crate) fn resident_mib(process: u32) -> anyhow::Result<f64> {
    mib(process, "VmRSS:")
}

/// The most it ever was.
pub(crate) fn peak_mib(process: u32) -> anyhow::Result<f64> {
    mib(process, "VmHWM:")
}

fn mib(process: u32, field: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    Ok(kib.context("the kernel does not tell the resident memory")? / 1024.0)
}

/// One line that says where the figures come from.
pub(crate) fn description() -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| cpus.lines().find_map(|line| line.strip_prefix(name)?.split(':').nth(1));
    let model = field("model name").unwrap_or("unknown CPU").trim();
    let cores = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let commit = said(Command::new("git").args(["rev-parse", "--short", "HEAD"]));
    let changed = if said(Command::new("git").args(["status", "--porcelain"])).is_empty() { "" } else { ", changed" };
    let nginx = on_path("nginx").map(|nginx| said(Command::new(nginx).arg("-v"))).unwrap_or_default();
    format!("{cores} cores of {model}, Linux {}; commit {commit}{changed}; {nginx}", kernel.trim())
}

/// What a command prints, on either of its outputs; nothing where it cannot run.
fn said(command: &mut Command) -> String {
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().ok().filter(|output| output.status.success());
    let bytes = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}
