//! All GPUs of this machine, once a second: a thread for each, so that one whose driver call hangs delays no other, and
//! one more that waits for the driver's events.
//!
//! A GPU that is lost stays lost for as long as the library is loaded: after a while it is loaded anew, at growing
//! intervals. So is one that was not there. A thread that hangs is left behind; it ends when its call does.
//!
//! Not here: GPUs that appear while the library is loaded.

use std::{
    collections::{HashMap, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nvml_wrapper::{
    EventSet, Nvml, bitmasks::event::EventTypes, enums::event::XidError, error::NvmlError,
    struct_wrappers::event::EventData,
};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    nvml::{self, Reader},
    processes::Processes,
    wire::{Gpu, Snapshot, Standing, Xid},
};

/// Between two readings. Utilization is sampled over at most a second, and each call takes a lock of the driver.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a snapshot waits for a GPU that is slow to answer; then what it said last is told.
const SETTLE: Duration = Duration::from_millis(500);
/// A GPU that owes an answer for so long is sick. Usual answers come within milliseconds.
const SILENT_AFTER: Duration = Duration::from_secs(3);
/// First time after which a missing library or GPU is tried anew; doubles up to [`RELOAD_MAX`].
const RELOAD_FIRST: Duration = Duration::from_secs(2);
const RELOAD_MAX: Duration = Duration::from_secs(300);
/// Longest wait for an event, and so for the end of its thread.
const EVENT_WAIT_MS: u32 = 1000;
/// Between two events: a GPU that dies may report thousands.
const EVENT_GAP: Duration = Duration::from_millis(20);
/// Errors that are remembered of each GPU, and for how long.
const XIDS_MAX: usize = 16;
const XID_MEMORY: Duration = Duration::from_secs(600);
/// A double-bit ECC event, as an XID.
const DOUBLE_BIT_ECC: u64 = 48;

/// The latest reading; none before the first.
pub type Readings = watch::Receiver<Option<Arc<Snapshot>>>;

/// Reads this machine's GPUs until `stop` or until nobody listens, with the driver's library or another in its place.
///
/// # Errors
/// When the system gives no thread.
pub fn read_here(library: Option<PathBuf>, stop: CancellationToken) -> io::Result<Readings> {
    let (told, readings) = watch::channel(None);
    let node = Node {
        library,
        stop,
        told,
        host: fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
        processes: Processes::new("/proc"),
    };
    spawn("gpus", move || node.run())?;
    Ok(readings)
}

/// The next of `readings`; none when they are over. Cancel-safe.
pub(super) async fn next(readings: &mut Readings) -> Option<Arc<Snapshot>> {
    loop {
        readings.changed().await.ok()?;
        let latest = readings.borrow_and_update().clone();
        if latest.is_some() {
            return latest;
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
}

struct Node {
    library: Option<PathBuf>,
    stop: CancellationToken,
    told: watch::Sender<Option<Arc<Snapshot>>>,
    host: String,
    processes: Processes,
}

impl Node {
    fn run(mut self) {
        let mut reload = RELOAD_FIRST;
        while !self.is_over() {
            let problem = match Session::start(self.library.as_deref(), self.stop.clone()) {
                Ok(session) => {
                    let began = Instant::now();
                    self.follow(&session, reload);
                    session.state.lock().over = true;
                    session.go.notify_all();
                    // what went well for long is no row of failures
                    reload = if began.elapsed() > 2 * reload { RELOAD_FIRST } else { (reload * 2).min(RELOAD_MAX) };
                    continue;
                }
                Err(problem) => problem,
            };
            tracing::debug!(problem, "no GPU can be read");
            self.wait_with(&problem, reload);
            reload = (reload * 2).min(RELOAD_MAX);
        }
    }

    fn is_over(&self) -> bool {
        self.stop.is_cancelled() || self.told.is_closed()
    }

    /// Says each second why there is nothing to say, so that whoever listens knows that this node is there.
    fn wait_with(&self, problem: &str, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until && !self.is_over() {
            let snapshot =
                Snapshot { host: self.host.clone(), problem: Some(problem.to_owned()), ..Snapshot::default() };
            self.told.send_replace(Some(Arc::new(snapshot)));
            thread::sleep(PERIOD);
        }
    }

    /// Tells what the GPUs say, until it is over or one of them has been lost for `patience`.
    fn follow(&mut self, session: &Arc<Session>, patience: Duration) {
        let mut lost: Option<Instant> = None;
        let mut settle = SILENT_AFTER;
        while !self.is_over() {
            let began = Instant::now();
            session.ask(began + settle);
            settle = SETTLE;
            loop {
                let gpus = session.gpus(Instant::now());
                let gone = gpus.iter().any(|gpu| matches!(gpu.standing(), Standing::Lost | Standing::ResetRequired));
                lost = gone.then(|| lost.unwrap_or(began));
                self.tell(gpus, session.driver.clone());
                if !session.alarmed(began + PERIOD) {
                    break;
                }
            }
            if lost.is_some_and(|since| since.elapsed() >= patience) {
                return;
            }
        }
    }

    fn tell(&mut self, mut gpus: Vec<Gpu>, driver: Option<String>) {
        self.processes.complete(Instant::now(), gpus.iter_mut().flat_map(|gpu| &mut gpu.processes));
        let snapshot = Snapshot { host: self.host.clone(), driver, problem: None, gpus };
        self.told.send_replace(Some(Arc::new(snapshot)));
    }
}

/// The library, loaded, and the threads that call it.
struct Session {
    nvml: Nvml,
    driver: Option<String>,
    state: Mutex<State>,
    /// A new round of readings begins.
    go: Condvar,
    /// A reading or an event came.
    news: Condvar,
}

struct State {
    over: bool,
    round: u64,
    cells: Vec<Cell>,
    /// By UUID, oldest first.
    xids: HashMap<String, VecDeque<(u64, Instant)>>,
    /// An event came that nobody was told of.
    alarm: bool,
}

/// One GPU's readings.
#[derive(Default)]
struct Cell {
    /// When the question was asked to which there is no answer yet.
    asked: Option<Instant>,
    round: u64,
    /// The GPU and its MIG instances.
    said: Vec<Gpu>,
}

impl Cell {
    fn is_silent(&self, now: Instant) -> bool {
        self.asked.is_some_and(|at| now.duration_since(at) >= SILENT_AFTER)
    }
}

impl Session {
    fn start(library: Option<&Path>, stop: CancellationToken) -> Result<Arc<Self>, String> {
        let nvml = nvml::load(library).map_err(|error| error.to_string())?;
        let count = nvml.device_count().map_err(|error| error.to_string())?;
        let cells = (0..count).map(|_| Cell::default()).collect();
        let state = State { over: false, round: 0, cells, xids: HashMap::new(), alarm: false };
        let driver = nvml.sys_driver_version().ok();
        let session =
            Arc::new(Self { nvml, driver, state: Mutex::new(state), go: Condvar::new(), news: Condvar::new() });
        let started = || {
            for index in 0..count {
                let reading = Arc::clone(&session);
                spawn("gpu", move || reading.read(index))?;
            }
            let listening = Arc::clone(&session);
            spawn("gpu-events", move || listening.listen(count, &stop))
        };
        started().map_err(|error: io::Error| {
            session.state.lock().over = true;
            session.go.notify_all();
            error.to_string()
        })?;
        Ok(session)
    }

    /// Begins a round of readings and waits for them, no longer than `until`, and for none that is silent.
    fn ask(&self, until: Instant) {
        let mut state = self.state.lock();
        state.round += 1;
        let (round, now) = (state.round, Instant::now());
        for cell in &mut state.cells {
            cell.asked.get_or_insert(now);
        }
        self.go.notify_all();
        while state.cells.iter().any(|cell| cell.round < round && !cell.is_silent(now)) {
            if self.news.wait_until(&mut state, until).timed_out() {
                return;
            }
        }
    }

    /// What the GPUs said last.
    fn gpus(&self, now: Instant) -> Vec<Gpu> {
        let mut state = self.state.lock();
        state.alarm = false;
        let State { cells, xids, .. } = &mut *state;
        let mut all = Vec::new();
        for (index, cell) in cells.iter().enumerate() {
            let mut gpus = if cell.is_silent(now) { silent(index, &cell.said) } else { cell.said.clone() };
            let errors = gpus.first().and_then(|gpu| xids.get_mut(gpu.uuid.as_ref()?));
            let errors = errors.map(|errors| {
                errors.retain(|(_, at)| now.duration_since(*at) < XID_MEMORY);
                errors.iter().map(|(code, at)| Xid { code: *code, age_ms: milliseconds(now.duration_since(*at)) })
            });
            let errors: Vec<Xid> = errors.into_iter().flatten().collect();
            gpus.iter_mut().for_each(|gpu| gpu.xids.clone_from(&errors));
            all.extend(gpus);
        }
        all
    }

    /// Whether an event came before `until`.
    fn alarmed(&self, until: Instant) -> bool {
        let mut state = self.state.lock();
        while !state.alarm {
            if self.news.wait_until(&mut state, until).timed_out() {
                return false;
            }
        }
        true
    }

    /// Reads one GPU each round.
    fn read(&self, index: u32) {
        let mut reader = Reader::new(&self.nvml, index);
        let mut round = 0;
        loop {
            {
                let mut state = self.state.lock();
                while state.round == round && !state.over {
                    self.go.wait(&mut state);
                }
                if state.over {
                    return;
                }
                round = state.round;
            }
            let said = reader.read();
            if let Some(cell) = self.state.lock().cells.get_mut(index as usize) {
                *cell = Cell { asked: None, round, said };
            }
            self.news.notify_all();
        }
    }

    /// Waits for the driver's events.
    fn listen(&self, count: u32, stop: &CancellationToken) {
        let Some(set) = self.event_set(count) else { return };
        while !stop.is_cancelled() && !self.state.lock().over {
            match set.wait(EVENT_WAIT_MS) {
                Ok(event) => {
                    self.note(&event);
                    thread::sleep(EVENT_GAP);
                }
                Err(NvmlError::Timeout) => {}
                Err(error) => {
                    tracing::debug!(%error, "the driver's events cannot be waited for");
                    thread::sleep(PERIOD);
                }
            }
        }
    }

    /// The errors of all GPUs that tell them.
    fn event_set(&self, count: u32) -> Option<EventSet<'_>> {
        let wanted = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
        let devices = (0..count).filter_map(|index| self.nvml.device_by_index(index).ok());
        let mut devices: Vec<_> = devices
            .filter_map(|device| {
                let types = device.supported_event_types().ok()? & wanted;
                (!types.is_empty()).then_some((device, types))
            })
            .collect();
        // A GPU that refuses takes the set with it.
        while !devices.is_empty() {
            let mut set = Some(self.nvml.create_event_set().ok()?);
            let refused = devices.iter().position(|(device, types)| {
                set = set.take().and_then(|set| device.register_events(*types, set).ok());
                set.is_none()
            });
            match refused {
                None => return set,
                Some(at) => drop(devices.remove(at)),
            }
        }
        None
    }

    fn note(&self, event: &EventData<'_>) {
        let code = match event.event_data {
            Some(XidError::Value(code)) => code,
            Some(XidError::Unknown) => 0,
            None if event.event_type.contains(EventTypes::DOUBLE_BIT_ECC_ERROR) => DOUBLE_BIT_ECC,
            None => return,
        };
        // One that fell off the bus may not say which it is; its reading shows that it is lost.
        let Ok(uuid) = event.device.uuid() else { return };
        tracing::warn!(gpu = uuid, xid = code, "the driver reports an error");
        let mut state = self.state.lock();
        let errors = state.xids.entry(uuid).or_default();
        errors.push_back((code, Instant::now()));
        if errors.len() > XIDS_MAX {
            errors.pop_front();
        }
        state.alarm = true;
        drop(state);
        self.news.notify_all();
    }
}

/// GPUs that owe an answer: what they said before is out of date.
fn silent(index: usize, said: &[Gpu]) -> Vec<Gpu> {
    let bare = |gpu: &Gpu| Gpu {
        index: gpu.index.clone(),
        uuid: gpu.uuid.clone(),
        name: gpu.name.clone(),
        standing: Standing::Silent.into(),
        ..Gpu::default()
    };
    match said {
        [] => vec![bare(&Gpu { index: index.to_string(), ..Gpu::default() })],
        said => said.iter().map(bare).collect(),
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
