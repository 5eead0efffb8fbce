//! What can be tuned about decisions, with the reason for each default. One value for the whole core.

use std::time::Duration;

/// Tunables of the core. Evidence for the defaults that carry no other source: simulations of 4 to 16 workers over
/// public conversation traces.
#[derive(Debug, Clone)]
pub struct Config {
    /// Bytes that one pool's prefix index may take (64 MiB: some 3 million blocks).
    pub index_bytes_max: usize,
    /// How long a routed prompt is believed to be in the cache of a worker that publishes events (5 s: time for the
    /// event to come).
    pub speculative_lease: Duration,
    /// The same for a worker that publishes none (120 s).
    pub speculative_ttl: Duration,
    /// Seconds that KV pressure `k` costs, times `k/(1-k)` (0.3 s).
    pub kv_pressure_seconds: f64,
    /// What a second more of decoding costs against one of waiting for the first token (0.03: keeps batches even, and
    /// the first tokens as early as without it).
    pub decode_weight: f64,
    /// Standard deviations of the expected output that a KV cache keeps free beyond its mean (1).
    pub kv_deviations: f64,
    /// What a cached token that no other worker holds is worth against one to prefill, in a calm pool (1.2): above 1
    /// pays for keeping conversations together; with 1.5 they queue behind each other when many come at once.
    pub overlap_gain_calm: f64,
    /// The same in a pool near saturation, where a lost cache costs others too (6).
    pub overlap_gain_busy: f64,
    /// How long a long prompt gives way to shorter ones at most: so many times the most seconds of prefill that stood
    /// before a request of late (1.7).
    pub patience_share: f64,
    /// Half-life of the memory of that (60 s).
    pub patience_half_life: Duration,
    /// Least time that a long prompt gives way at most (2 s).
    pub patience_min: Duration,
    /// Prefill time of a prompt that gives way for half of that (5 s).
    pub patience_half: Duration,
    /// How much prefill to have at a worker at most, in time at its speed, while hardly anything waits (700 ms: more is
    /// out of our hands too early, less leaves engines without work).
    pub window: Duration,
    /// The same when much waits (1.2 s: a full step of most engines, and a little of the next).
    pub window_busy: Duration,
    /// What waits for each worker then, in time at its speed (500 ms).
    pub window_busy_from: Duration,
    /// The same for batch work beside other classes, and for a tenant that floods a pool of several (120 ms: a light
    /// tenant's p99 is 1.4 times what it is alone; larger costs it more, smaller costs the flood throughput).
    pub window_yielding: Duration,
    /// How often the head of a lane that does not move is compared with other lanes (500 ms).
    pub rescore_every: Duration,
    /// How much worse its lane must be before it moves (0.3).
    pub move_gain: f64,
    /// Age at which an engine's report is no longer used (15 s: three idle polls).
    pub report_ttl: Duration,
    /// How long what a GPU said holds without another word from it (5 s: five readings).
    pub gpu_lease: Duration,
    /// How long it is believed that others use a GPU when our own work hides whether they still do (15 s).
    pub foreign_lease: Duration,
    /// Time that a worker takes to wake until that was measured (5 s: weights of some 60 GB from host memory).
    pub wake_assumed: Duration,
    /// The same to fall asleep (2 s).
    pub sleep_assumed: Duration,
    /// How long a worker that could not be woken, put to sleep, or given an adapter is left alone with it (5 s);
    /// doubles with each failure.
    pub wake_retry: Duration,
    /// The longest of that (60 s).
    pub wake_retry_max: Duration,
    /// Longest wait for a worker that was told to wake, to sleep or to load (10 minutes: a cold start).
    pub wake_max: Duration,
    /// How long after such a change what its engine says of it may still be from before (5 s: two polls).
    pub sleep_settles: Duration,
    /// Time that a worker takes to load an adapter until that was measured (1 s: some 100 MB from a disk, and into
    /// memory).
    pub adapter_load_assumed: Duration,
    /// How long a worker that refused an adapter is not asked for it again (60 s: its files may have come by then).
    pub adapter_refused: Duration,
    /// How long an adapter that is in use keeps its place while another waits for one (2 s).
    pub adapter_turn: Duration,
    /// Time of prefill below which a prefix that another request is computing is not waited for (50 ms: a few steps of
    /// the engine).
    pub sibling_gain: Duration,
    /// Longest wait for another request's prefill (10 s).
    pub sibling_wait_max: Duration,
    /// How long it is believed to take until memory is free that is not ours (10 s).
    pub memory_lease: Duration,
    /// How long an overloaded worker is left alone when it names no time (1 s); twice as long each time it says so
    /// again and nothing worked in between, and up to a quarter longer by chance.
    pub busy_lease: Duration,
    /// The longest of these (4 s: what was full has room again sooner, most often).
    pub busy_lease_max: Duration,
    /// Time to the second probe of a worker that is not up; doubles from there (500 ms).
    pub probe_first: Duration,
    /// Longest time between probes (5 s).
    pub probe_max: Duration,
    /// When a worker that fails requests gets no more.
    pub breaker: Breaker,
    /// How long a worker that returns from an illness gets less than its share (20 s).
    pub slow_start: Duration,
    /// Share of a pool's workers that may be left alone for being slow; at least one of several (0.3).
    pub outliers_max: f64,
    /// Share of what its workers can do at which a pool has as many as it needs (0.7: the rest is for bursts).
    pub scale_full: f64,
    /// How soon what waits should be prefilled in a pool that has as many as it needs (5 s).
    pub scale_drain: Duration,
    /// Prefill speed of a pool in which nothing was measured or hinted yet (2000 tokens/s).
    pub rate_cold: f64,
    /// Decisions kept for `explain` (1024).
    pub decisions_kept: usize,
}

/// Settings of the breaker: a failure rate with a minimum volume. A count of consecutive failures would eject healthy
/// workers under connection churn.
#[derive(Debug, Clone)]
pub struct Breaker {
    /// Half-life of the counts (10 s).
    pub half_life: Duration,
    /// Attempts within the window below which it does not open (5).
    pub volume_min: f64,
    /// Share of failures at which it opens (0.5).
    pub failure_share: f64,
    /// The same with answers that it cannot serve now among them (0.9: a full engine gives many, and works).
    pub unavailable_share: f64,
    /// First time it stays open; doubles with each failed trial (5 s).
    pub open_first: Duration,
    /// Longest time it stays open (60 s).
    pub open_max: Duration,
    /// How long nobody tries it before an answer to a probe will do (30 s).
    pub untried_max: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            index_bytes_max: 64 << 20,
            speculative_lease: Duration::from_secs(5),
            speculative_ttl: Duration::from_secs(120),
            kv_pressure_seconds: 0.3,
            decode_weight: 0.03,
            kv_deviations: 1.0,
            overlap_gain_calm: 1.2,
            overlap_gain_busy: 6.0,
            patience_share: 1.7,
            patience_half_life: Duration::from_secs(60),
            patience_min: Duration::from_secs(2),
            patience_half: Duration::from_secs(5),
            window: Duration::from_millis(700),
            window_busy: Duration::from_millis(1200),
            window_busy_from: Duration::from_millis(500),
            window_yielding: Duration::from_millis(120),
            rescore_every: Duration::from_millis(500),
            move_gain: 0.3,
            report_ttl: Duration::from_secs(15),
            gpu_lease: Duration::from_secs(5),
            foreign_lease: Duration::from_secs(15),
            wake_assumed: Duration::from_secs(5),
            sleep_assumed: Duration::from_secs(2),
            wake_retry: Duration::from_secs(5),
            wake_retry_max: Duration::from_secs(60),
            wake_max: Duration::from_secs(600),
            sleep_settles: Duration::from_secs(5),
            adapter_load_assumed: Duration::from_secs(1),
            adapter_refused: Duration::from_secs(60),
            adapter_turn: Duration::from_secs(2),
            sibling_gain: Duration::from_millis(50),
            sibling_wait_max: Duration::from_secs(10),
            memory_lease: Duration::from_secs(10),
            busy_lease: Duration::from_secs(1),
            busy_lease_max: Duration::from_secs(4),
            probe_first: Duration::from_millis(500),
            probe_max: Duration::from_secs(5),
            breaker: Breaker::default(),
            slow_start: Duration::from_secs(20),
            outliers_max: 0.3,
            scale_full: 0.7,
            scale_drain: Duration::from_secs(5),
            rate_cold: 2000.0,
            decisions_kept: 1024,
        }
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            half_life: Duration::from_secs(10),
            volume_min: 5.0,
            failure_share: 0.5,
            unavailable_share: 0.9,
            open_first: Duration::from_secs(5),
            open_max: Duration::from_secs(60),
            untried_max: Duration::from_secs(30),
        }
    }
}
