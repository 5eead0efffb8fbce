//! One GPU, read through NVML: a field the driver does not give is absent, and an error that says that the GPU is gone
//! becomes its standing.
//!
//! A call takes tens of microseconds to milliseconds, and now and then for ever: only to be called on a thread of its own
//! for each GPU.

use std::{collections::BTreeMap, ffi::OsStr, path::Path};

use nvml_wrapper::{
    Device, Nvml,
    enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor, TemperatureThreshold},
    enums::device::UsedGpuMemory,
    error::NvmlError,
};

use super::wire::{Gpu, Process, Standing};

/// NVML's `NVML_NVLINK_MAX_LINKS`.
const NVLINKS_MAX: u32 = 18;

/// Loads the driver's library, or another in its place.
pub(super) fn load(library: Option<&Path>) -> Result<Nvml, NvmlError> {
    match library {
        Some(path) => Nvml::builder().lib_path(AsRef::<OsStr>::as_ref(path)).init(),
        None => Nvml::init(),
    }
}

/// Reads one GPU again and again.
pub(super) struct Reader<'n> {
    nvml: &'n Nvml,
    index: u32,
    /// What it said of itself once; what does not change is not asked again.
    fixed: Option<Gpu>,
    /// Moment of the last sample of its processes' utilization, in the driver's clock.
    sampled: u64,
}

impl<'n> Reader<'n> {
    pub(super) fn new(nvml: &'n Nvml, index: u32) -> Self {
        Self { nvml, index, fixed: None, sampled: 0 }
    }

    /// The GPU, then its MIG instances.
    pub(super) fn read(&mut self) -> Vec<Gpu> {
        let mut answers = Answers::default();
        let Some(device) = answers.take(self.nvml.device_by_index(self.index)) else {
            return vec![self.unread(answers.standing)];
        };
        if self.fixed.as_ref().is_none_or(|fixed| fixed.uuid.is_none()) {
            self.fixed = Some(fixed(self.index, &device, &mut answers));
        }
        let gpu = self.changing(&device, &mut answers);
        let gpu = if answers.standing == Standing::Well { gpu } else { self.unread(answers.standing) };
        let mut all = vec![gpu];
        if let Some(whole) = all.first_mut().filter(|gpu| gpu.standing() == Standing::Well) {
            let instances = instances(&device, whole);
            // Those of its instances are told of the whole as well, which they do not have to themselves.
            whole.processes.retain(|process| !instances.iter().any(|instance| has(instance, process)));
            all.extend(instances);
        }
        all
    }

    /// All that is to be said of a GPU that does not answer.
    pub(super) fn unread(&self, standing: Standing) -> Gpu {
        let fixed = self.fixed.clone().unwrap_or_else(|| Gpu { index: self.index.to_string(), ..Gpu::default() });
        Gpu { standing: standing.into(), ..fixed }
    }

    fn changing(&mut self, device: &Device<'_>, answers: &mut Answers) -> Gpu {
        let memory = answers.take(device.memory_info());
        let links = (0..NVLINKS_MAX).map_while(|link| device.link_wrapper_for(link).is_active().ok());
        let links: Vec<bool> = links.collect();
        let ecc = |errors| device.total_ecc_errors(errors, EccCounter::Volatile);
        Gpu {
            memory_total_bytes: memory.as_ref().map(|memory| memory.total),
            memory_used_bytes: memory.as_ref().map(|memory| memory.used),
            utilization_percent: answers.take(device.utilization_rates()).map(|rates| rates.gpu),
            temperature_celsius: answers.take(device.temperature(TemperatureSensor::Gpu)),
            power_milliwatts: answers.take(device.power_usage()),
            power_limit_milliwatts: answers.take(device.enforced_power_limit()),
            sm_clock_mhz: answers.take(device.clock_info(Clock::SM)),
            throttle_reasons: answers.take(device.current_throttle_reasons()).map(|reasons| reasons.bits()),
            ecc_corrected: answers.take(ecc(MemoryError::Corrected)),
            ecc_uncorrected: answers.take(ecc(MemoryError::Uncorrected)),
            nvlinks_active: (!links.is_empty())
                .then(|| u32::try_from(links.iter().filter(|up| **up).count()).unwrap_or(NVLINKS_MAX)),
            processes: self.processes(device, answers),
            ..self.unread(Standing::Well)
        }
    }

    fn processes(&mut self, device: &Device<'_>, answers: &mut Answers) -> Vec<Process> {
        let mut processes = processes(device, answers);
        if processes.is_empty() {
            return processes;
        }
        let samples = match device.process_utilization_stats(self.sampled) {
            Ok(samples) => samples,
            // none that is younger: none of them did anything
            Err(NvmlError::NotFound) => Vec::new(),
            Err(_) => return processes,
        };
        let mut latest: BTreeMap<u32, (u64, u32)> = BTreeMap::new();
        for sample in samples {
            self.sampled = self.sampled.max(sample.timestamp);
            let known = latest.entry(sample.pid).or_default();
            *known = (*known).max((sample.timestamp, sample.sm_util.min(100)));
        }
        for process in &mut processes {
            process.sm_percent = Some(latest.get(&process.pid).map_or(0, |(_, share)| *share));
        }
        processes
    }
}

fn fixed(index: u32, device: &Device<'_>, answers: &mut Answers) -> Gpu {
    Gpu {
        index: index.to_string(),
        uuid: answers.take(device.uuid()),
        name: answers.take(device.name()),
        slowdown_celsius: answers.take(device.temperature_threshold(TemperatureThreshold::Slowdown)),
        sm_clock_max_mhz: answers.take(device.max_clock_info(Clock::SM)),
        ..Gpu::default()
    }
}

/// The MIG instances of a GPU. Which there are can change while it runs.
fn instances(device: &Device<'_>, whole: &Gpu) -> Vec<Gpu> {
    if !device.mig_mode().is_ok_and(|mode| mode.current != 0) {
        return Vec::new();
    }
    let places = 0..device.mig_device_count().unwrap_or(0);
    let instances = places.filter_map(|place| {
        let instance = device.mig_device_by_index(place).ok()?;
        let mut answers = Answers::default();
        let memory = answers.take(instance.memory_info());
        Some(Gpu {
            index: format!("{}:{place}", whole.index),
            uuid: answers.take(instance.uuid()),
            name: answers.take(instance.name()).or_else(|| whole.name.clone()),
            memory_total_bytes: memory.as_ref().map(|memory| memory.total),
            memory_used_bytes: memory.as_ref().map(|memory| memory.used),
            utilization_percent: None,
            processes: processes(&instance, &mut answers),
            ..whole.clone()
        })
    });
    instances.collect()
}

fn has(gpu: &Gpu, process: &Process) -> bool {
    gpu.processes.iter().any(|known| known.pid == process.pid)
}

fn processes(device: &Device<'_>, answers: &mut Answers) -> Vec<Process> {
    let running = answers.take(device.running_compute_processes()).unwrap_or_default();
    let processes = running.into_iter().map(|process| Process {
        pid: process.pid,
        memory_bytes: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
        ..Process::default()
    });
    processes.collect()
}

/// What a row of questions showed of the one who was asked.
#[derive(Default)]
struct Answers {
    standing: Standing,
}

impl Answers {
    fn take<T>(&mut self, answer: Result<T, NvmlError>) -> Option<T> {
        match answer {
            Ok(value) => return Some(value),
            Err(NvmlError::GpuLost) => self.standing = Standing::Lost,
            Err(NvmlError::ResetRequired) => self.standing = Standing::ResetRequired,
            Err(_) => {}
        }
        None
    }
}
