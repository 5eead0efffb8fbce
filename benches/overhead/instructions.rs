//! Instructions that Forebay executes for a request: a figure that does not depend on the machine's mood.
//!
//! The gateway runs under valgrind's callgrind. For every path it answers some requests to fill its pools, then the
//! counters are zeroed, and what they say after the next requests is divided by their number. Counted are the process's
//! own instructions, not the kernel's: a system call is one. Threads take turns under valgrind, which changes who waits
//! for whom, so that figures of two runs differ by some 1%.
//!
//! The counts stay in `target/instructions/`, for `callgrind_annotate`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use crate::load::{Enough, Form, drive};
use crate::proxy::Proxy;
use crate::upstream::MODELS;
use crate::{Arguments, WAYS, answers, machine};

/// Requests before the counting, enough for every connection to be made and reused.
const WARM_UP: u32 = 200;

/// Prints a table of the wanted paths, without those that take their time on purpose.
pub(crate) async fn count(
    program: &Path,
    upstream: SocketAddr,
    wanted: &Arguments,
    requests: u32,
) -> anyhow::Result<()> {
    let valgrind = machine::on_path("valgrind").context("valgrind is needed (apt-get install valgrind)")?;
    let counts = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("instructions");
    std::fs::create_dir_all(&counts)?;
    let file = counts.join("callgrind.out");
    let mut command = Command::new(valgrind);
    command.arg("--tool=callgrind").arg(format!("--callgrind-out-file={}", file.display())).arg(program);
    let mut proxy = Proxy::forebay("forebay", command, &[upstream])?;
    answers(&mut proxy).await?;

    println!(
        "{}; {}\n\n| path | through | instructions a request |\n| --- | --- | --- |",
        machine::description(),
        program.display()
    );
    let mut dumps = 0;
    let ways = WAYS.iter().filter(|way| way.name.contains(&wanted.only));
    for way in ways.filter(|way| !matches!(way.question.form, Form::PacedStream(_))) {
        for model in MODELS.into_iter().filter(|model| model.contains(&wanted.through)) {
            let ask = |count| drive(proxy.address, model, way.question, way.connections, Enough::Requests(count));
            ask(WARM_UP).await?;
            control(&["--zero"], &proxy)?;
            let answered = ask(requests).await?.len();
            dumps += 1;
            control(&["--dump"], &proxy)?;
            let dump = file.with_extension(format!("out.{dumps}"));
            let total = total(&dump).with_context(|| format!("no count in {}", dump.display()))?;
            println!("| {} | {model} | {:.0} |", way.name, total / answered as f64);
        }
    }
    Ok(())
}

fn control(what: &[&str], proxy: &Proxy) -> anyhow::Result<()> {
    let mut control = Command::new("callgrind_control");
    let status =
        control.args(what).arg(proxy.process().to_string()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "callgrind_control {what:?}: {status}\n{}", proxy.log());
    Ok(())
}

/// The sum at the end of a file of callgrind's.
fn total(dump: &Path) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(dump)?;
    let total = text.lines().rev().find_map(|line| line.strip_prefix("totals: "));
    Ok(total.context("no line of totals")?.trim().parse()?)
}
