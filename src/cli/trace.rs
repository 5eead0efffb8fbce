//! Reads a trace: one JSON object a line, plain or gzip.
//!
//! The file does not say how many tokens a block has. It is the power of two with which every row's number of `hash_ids`
//! is its prompt in blocks, the last one possibly partial; a file with ids for which there is none is refused.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use flate2::read::MultiGzDecoder;
use forebay_scheduler::Class;
use forebay_simulator::{Row, Trace};
use serde::Deserialize;

/// Block sizes that are tried, in tokens.
const BLOCK_TOKENS: [u32; 14] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192];
/// The longest line, in bytes: a prompt of a million tokens in blocks of 16 fits.
const LINE_MAX: u64 = 4 << 20;

#[derive(Deserialize)]
struct Line {
    t_ms: u64,
    in_tokens: u32,
    out_tokens: u32,
    hash_ids: Option<Vec<u64>>,
    tenant: Option<String>,
    class: Option<Kind>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Interactive,
    Default,
    Batch,
}

/// The trace in `path`; blocks of `block_tokens` where it has no ids.
pub(super) fn read(path: &Path, block_tokens: u32) -> anyhow::Result<Trace> {
    let name = path.display();
    let mut file = File::open(path).with_context(|| format!("cannot open `{name}`"))?;
    let mut magic = Vec::new();
    file.by_ref().take(2).read_to_end(&mut magic).with_context(|| format!("cannot read `{name}`"))?;
    let gzip = magic == [0x1f, 0x8b];
    let whole = magic.as_slice().chain(file);
    let mut reader: Box<dyn BufRead> =
        if gzip { Box::new(BufReader::new(MultiGzDecoder::new(whole))) } else { Box::new(BufReader::new(whole)) };
    let mut lines: Vec<Line> = Vec::new();
    let mut text = Vec::new();
    for number in 1.. {
        text.clear();
        let length = reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut text);
        if length.with_context(|| format!("{name}:{number}: cannot be read"))? == 0 {
            break;
        }
        if text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let line: Line =
            serde_json::from_slice(&text).with_context(|| format!("{name}:{number}: not a row of a trace"))?;
        let earlier = lines.last().is_some_and(|last| last.t_ms > line.t_ms);
        ensure!(!earlier, "{name}:{number}: t_ms is less than in the row before: rows must be sorted");
        lines.push(line);
    }
    ensure!(!lines.is_empty(), "`{name}` has no rows");
    let block_tokens = block_size(&lines, block_tokens).with_context(|| format!("cannot use `{name}`"))?;
    Ok(Trace { block_tokens, rows: rows(lines, block_tokens) })
}

fn block_size(lines: &[Line], without: u32) -> anyhow::Result<u32> {
    let with_ids = || lines.iter().filter_map(|line| Some((line.in_tokens, line.hash_ids.as_ref()?.len())));
    if with_ids().all(|(_, ids)| ids == 0) {
        return Ok(without);
    }
    let fits = |size: &u32| with_ids().all(|(tokens, ids)| tokens.div_ceil(*size) as usize == ids);
    let mut fitting = BLOCK_TOKENS.into_iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(size), None) => Ok(size),
        (Some(size), Some(other)) => {
            bail!("its prompts fit blocks of {size} and of {other} tokens: more rows are needed")
        }
        (None, _) => bail!("there is no block size, a power of two, for which each row's hash_ids cover its in_tokens"),
    }
}

fn rows(lines: Vec<Line>, block_tokens: u32) -> Vec<Row> {
    let mut tenants: HashMap<Option<String>, u32> = HashMap::new();
    let row = |line: Line| {
        let new = u32::try_from(tenants.len()).unwrap_or(u32::MAX);
        // What is in a block that is not full is not in any cache.
        let full = (line.in_tokens / block_tokens) as usize;
        Row {
            at: Duration::from_millis(line.t_ms),
            prompt_tokens: line.in_tokens,
            output_tokens: line.out_tokens,
            blocks: line.hash_ids.unwrap_or_default().into_iter().take(full).map(Trace::block_hash).collect(),
            tenant: *tenants.entry(line.tenant).or_insert(new),
            class: match line.class {
                Some(Kind::Interactive) => Class::Interactive,
                Some(Kind::Default) | None => Class::Default,
                Some(Kind::Batch) => Class::Batch,
            },
        }
    };
    lines.into_iter().map(row).collect()
}
