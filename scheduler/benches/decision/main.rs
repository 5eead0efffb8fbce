//! What decisions cost: percentiles of every call of the core in a fleet under load (`world`), look-ups in a full prefix
//! index, memory after a million prompts; and criterion's means, to compare two builds by.
//!
//!     cargo bench -p forebay-scheduler --bench decision                    everything (3 minutes)
//!     cargo bench -p forebay-scheduler --bench decision -- decision/10     what has this in its name
//!
//! Names: `memory`, `decision/<workers>`, `lookup`, `mean/<workers>`. Without cargo's `--bench` everything runs once and
//! briefly, which says only that it works.

mod costs;
mod world;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use forebay_scheduler::{Config, Core, End, Event, KvEvent, PoolLimits, RequestId, Tick, WorkerId};

use crate::costs::{Call, Costs, SHARES, Series, percentiles};
use crate::world::{POOL, World, conversation, request, spec};

/// The gateway's own, since decisions allocate.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Workers, the time in µs below which 99 % of their decisions are to stay, and how many requests come in a second for
/// each: so many that they are busy for about three quarters of the time.
const FLEETS: [(u32, f64, f64); 3] = [(10, 15.0, 6.0), (1000, 30.0, 6.0), (10_000, 60.0, 4.5)];
const ROUNDS: usize = 5;
const ARRIVALS: u64 = 200_000;

/// How much is done.
#[derive(Clone, Copy)]
struct Size {
    rounds: usize,
    arrivals: u64,
    prompts: u64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let measures = arguments.iter().any(|argument| argument == "--bench");
    let size = match measures {
        true => Size { rounds: ROUNDS, arrivals: ARRIVALS, prompts: 1_000_000 },
        false => Size { rounds: 1, arrivals: 1000, prompts: 10_000 },
    };
    let names: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let wanted = |name: &str| {
        names.is_empty() || names.iter().any(|wanted| name == *wanted || name.starts_with(&format!("{wanted}/")))
    };
    println!("one reading of the clock is in every time: {:.3} µs\n", clock_micros());
    // first, while nothing else has taken memory
    if wanted("memory") {
        memory(size);
    }
    for (workers, aim, rate) in FLEETS {
        if wanted(&format!("decision/{workers}")) {
            decisions((workers, rate), aim, size);
        }
    }
    if wanted("lookup") {
        lookups(size);
    }
    for (workers, _, rate) in FLEETS {
        let name = format!("mean/{workers}");
        if measures && wanted(&name) {
            mean(&name, workers, rate);
        }
    }
}

/// Percentiles of every kind of call.
fn decisions((workers, rate): (u32, f64), aim: f64, size: Size) {
    let mut least: Option<Costs> = None;
    let mut shown: Vec<(Call, &str, [Series; SHARES.len()])> =
        Call::NAMES.into_iter().map(|(call, name)| (call, name, Default::default())).collect();
    let (mut alone, mut beside) = (Series::default(), Series::default());
    for round in 0..size.rounds {
        let mut world = World::new(workers, rate);
        world.warm_up();
        world.run(size.arrivals);
        for (call, _, series) in &mut shown {
            let found = percentiles(world.costs.of(*call));
            series.iter_mut().zip(found).for_each(|(series, micros)| series.add(micros));
        }
        let each = world.costs.of_requests().as_secs_f64() / size.arrivals as f64;
        let taken = world.kv_events_each_second() * world.costs.mean(Call::Kv)
            + world.polls_each_second() * world.costs.mean(Call::Load);
        alone.add(1.0 / each);
        beside.add((1.0 - taken) / each);
        if round == 0 {
            describe(workers, &world, size);
        }
        match &mut least {
            Some(least) => least.least(&world.costs),
            None => least = Some(world.costs),
        }
    }
    let Some(least) = least else { return };
    println!(
        "{:30} {:>7}  {:>15}  {:>15}   {:>7} {:>7} {:>8} {:>9}",
        "µs", "each", "p50", "p99", "p50", "p99", "p99.9", "longest"
    );
    for (call, name, [p50, p99, ..]) in &shown {
        let calls = least.of(*call);
        let each = calls.len() as f64 / size.arrivals as f64;
        let both = |series: &Series| format!("{:.2} / {:.2}", series.least(), series.median());
        let quiet = percentiles(calls);
        let [half, most, nearly, longest] = quiet;
        println!(
            "{name:30} {each:7.3}  {:>15}  {:>15}   {half:7.2} {most:7.2} {nearly:8.2} {longest:9.1}",
            both(p50),
            both(p99)
        );
    }
    let p99 = shown.first().map_or(f64::NAN, |(_, _, [_, p99, ..])| p99.median());
    println!("decisions: median p99 {p99:.2} µs, to be below {aim} µs");
    println!(
        "decisions/s: {:.0} / {:.0} ({:.0} with each call at its least); beside 5000 KV events and a poll of every worker each second {:.0} / {:.0}\n",
        alone.most(),
        alone.median(),
        size.arrivals as f64 / least.of_requests().as_secs_f64(),
        beside.most(),
        beside.median()
    );
}

fn describe(workers: u32, world: &World, size: Size) {
    let view = world.core.pool_view(POOL);
    let (blocks, bytes) = view.map_or((0, 0), |view| (view.index_blocks, view.index_bytes));
    println!(
        "{workers} workers, {:.0} % busy: {} rounds of {} arrivals; best / median of the rounds, then of what each call took \
         in its best round; {} refused; index: {blocks} blocks, {:.1} of {:.1} MiB",
        world.utilization() * 100.0,
        size.rounds,
        size.arrivals,
        world.costs.refused,
        mebibytes(bytes),
        mebibytes(Config::default().index_bytes_max),
    );
}

/// Look-ups of prompts of 500 blocks, each held by some workers, in an index that has no room left.
fn lookups(size: Size) {
    const BLOCKS: u64 = 500;
    let fill = size.prompts.min(16_000);
    let mut core = fleet(10);
    for id in 0..fill {
        let worker = WorkerId((id % 10) as u32);
        let change = KvEvent::Stored { blocks: conversation(id, BLOCKS).to_vec() };
        core.handle(Tick(id), Event::Kv { worker, change }, &mut Vec::new());
    }
    let (mut p50, mut p99, mut matched) = (Series::default(), Series::default(), 0);
    let prompts: Vec<_> = (fill / 2..fill).map(|id| conversation(id, BLOCKS)).collect();
    for _ in 0..size.rounds {
        let mut nanos = Vec::new();
        matched = 0;
        for blocks in &prompts {
            let from = Instant::now();
            matched += u64::from(core.matched_tokens(Tick(fill), POOL, black_box(blocks))) / 16;
            nanos.push(u32::try_from(from.elapsed().as_nanos()).unwrap_or(u32::MAX));
        }
        let [half, most, ..] = percentiles(&nanos);
        p50.add(half);
        p99.add(most);
    }
    println!(
        "look-up of {BLOCKS} blocks, {} prompts, {} blocks of each found: p50 {:.2} / {:.2} µs, p99 {:.2} / {:.2} µs, to \
         be below 10 µs\n",
        prompts.len(),
        matched / prompts.len() as u64,
        p50.least(),
        p50.median(),
        p99.least(),
        p99.median()
    );
}

/// What the process holds after many different prompts.
fn memory(size: Size) {
    const UNDER_WAY: u64 = 64;
    let before = resident_bytes();
    let mut core = fleet(10);
    let mut out = Vec::new();
    for id in 0..size.prompts + UNDER_WAY {
        let now = Tick(id * 2000);
        out.clear();
        if id < size.prompts {
            core.handle(now, Event::Arrived(request(id, conversation(id, 125))), &mut out);
        }
        if let Some(request) = id.checked_sub(UNDER_WAY / 8).map(RequestId) {
            core.handle(now, Event::FirstToken { request }, &mut out);
        }
        if let Some(request) = id.checked_sub(UNDER_WAY).map(RequestId) {
            let end = End::Finished { prompt_tokens: 2000, cached_tokens: None, output_tokens: 200 };
            core.handle(now, Event::Ended { request, end }, &mut out);
        }
    }
    let (after, view) = (resident_bytes(), core.pool_view(POOL));
    let grown = match (before, after) {
        (Some(before), Some(after)) => format!("{:.1} MiB more resident", mebibytes(after.saturating_sub(before))),
        _ => "no /proc to read residence from".to_owned(),
    };
    println!(
        "memory after {} different prompts of 125 blocks: {grown}; index {:.1} of {:.1} MiB\n",
        size.prompts,
        view.map_or(f64::NAN, |view| mebibytes(view.index_bytes)),
        mebibytes(Config::default().index_bytes_max)
    );
}

/// Mean of all that one request costs, by criterion.
fn mean(name: &str, workers: u32, rate: f64) {
    let mut world = World::new(workers, rate);
    world.warm_up();
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .sample_size(20)
        .without_plots();
    criterion.bench_function(name, |bencher| {
        bencher.iter_custom(|requests| {
            world.costs = Costs::default();
            world.run(requests);
            world.costs.of_requests()
        });
    });
}

fn fleet(workers: u32) -> Core {
    let mut core = Core::new(Config::default(), 1);
    let mut out = Vec::new();
    core.handle(Tick::ZERO, Event::PoolJoined { pool: POOL, limits: PoolLimits::default() }, &mut out);
    for worker in (0..workers).map(WorkerId) {
        core.handle(Tick::ZERO, Event::WorkerJoined { worker, pool: POOL, spec: spec(worker) }, &mut out);
        core.handle(Tick::ZERO, Event::Probed { worker, healthy: true }, &mut out);
    }
    core
}

fn clock_micros() -> f64 {
    const READINGS: u32 = 100_000;
    let from = Instant::now();
    for _ in 0..READINGS {
        black_box(black_box(Instant::now()).elapsed());
    }
    from.elapsed().as_secs_f64() * 1e6 / f64::from(READINGS) / 2.0
}

/// Memory that the process has in RAM; the second number of `/proc/self/statm` (Linux), in pages of 4 KiB.
fn resident_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(text.split_whitespace().nth(1)?.parse::<usize>().ok()? * 4096)
}

fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
