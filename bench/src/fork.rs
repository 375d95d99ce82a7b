//! The suite `fork`: of a running guest, by how much it has written and by how many children it gets.

use crate::clone::{Failure, Template, between, go, row};
use crate::record::{Axis, Recorder, Unit};
use peregrine::artefacts::Artefacts;
use peregrine_vmm::agent::Agent;
use peregrine_vmm::worker::{Worker, monotonic_ns};
use std::time::Duration;

/// Beyond this a goal says nothing.
const GOAL_DIRTY_MIB: u64 = 16;

/// The template for guests that write so much: with room for it.
pub(crate) fn template(artefacts: &Artefacts, dirty_mib: u64) -> Result<(Template, String), Failure> {
    let mem_mib = if dirty_mib <= 64 { 256 } else { 1024 };
    let guest = if mem_mib == 256 { String::new() } else { format!(" of {mem_mib}") };
    Ok((Template::prepare(artefacts, mem_mib)?, format!("{dirty_mib} MiB dirty{guest}")))
}

/// The goals of a figure that grows with what is dirty.
pub(crate) fn goals(dirty_mib: u64, goals: (f64, f64)) -> Option<(f64, f64)> {
    (dirty_mib <= GOAL_DIRTY_MIB).then_some(goals)
}

/// `fork`: one child of a running guest that has written so many MiB since its template.
///
/// # Errors
/// The first fork that failed.
pub fn fork(artefacts: &Artefacts, samples: u32, dirty_mib: &[u64]) -> Result<Vec<Recorder>, Failure> {
    let mut all = Vec::new();
    for &mib in dirty_mib {
        let (template, variant) = template(artefacts, mib)?;
        let parent = template.dirty(mib)?;
        let mut pause = row(
            "live fork, pause",
            "request decoded, vCPU running -> vCPU told to go on",
            goals(mib, (0.5, 3.0)),
            &variant,
            Unit::Milliseconds,
        );
        let mut child = row(
            "live fork, child",
            "owner's call -> first VM exit made by the child",
            goals(mib, (1.0, 5.0)),
            &variant,
            Unit::Milliseconds,
        );
        for n in 0..samples {
            if n % 100 == 0 {
                eprintln!("fork, {variant}: {n} of {samples}");
            }
            let sample = once(&parent.worker, &parent.agent)?;
            pause.duration(sample.pause);
            child.duration(sample.child);
        }
        all.extend([pause, child].map(|row| row.on(Axis::DirtyMib, mib)));
    }
    Ok(all)
}

/// One fork into one child.
#[derive(Debug, Clone, Copy)]
pub struct Fork {
    /// The parent stood still.
    pub pause: Duration,
    /// Until the child's first VM exit.
    pub child: Duration,
}

/// Forks a running guest once; the child ends.
///
/// # Errors
/// What the worker or the child said.
pub fn once(worker: &Worker, agent: &Agent) -> Result<Fork, Failure> {
    let begun = monotonic_ns();
    let mut fork = worker.fork(agent, 1)?;
    let pause = between(fork.decoded_ns, fork.resumed_ns)?;
    let child = go(fork.children.pop().ok_or("no child")?)?;
    Ok(Fork { pause, child: between(begun, child.first_exit_ns)? })
}

/// `children`: many children of one fork, all alive at once, each with an identity of its own.
///
/// # Errors
/// The first fork that failed.
pub fn children(artefacts: &Artefacts, samples: u32, counts: &[u32]) -> Result<Vec<Recorder>, Failure> {
    let (template, _) = template(artefacts, 0)?;
    let parent = template.dirty(0)?;
    let ready = |count: u32| -> Result<_, Failure> {
        let begun = monotonic_ns();
        let fork = parent.worker.fork(&parent.agent, count as usize)?;
        Ok((between(begun, monotonic_ns())?, fork.children))
    };
    let mut all = Vec::new();
    for &count in counts {
        eprintln!("fork, {count} children");
        let variant = format!("{count} children");
        let mut further = row(
            "fork per further child",
            "(N children ready - one child ready) / (N - 1), owner's clock; nothing dirty",
            Some((0.4, 2.0)),
            &variant,
            Unit::Milliseconds,
        );
        let mut alive = row(
            "fork, all children alive",
            "owner's call -> the last of N children has its own identity, all of them and the parent alive",
            None,
            &variant,
            Unit::Milliseconds,
        );
        // What many children do takes as much longer.
        for _ in 0..(samples * 4 / count).clamp(1, samples) {
            let (one, only) = ready(1)?;
            drop(only);
            let begun = monotonic_ns();
            let (many, children) = ready(count)?;
            if let Some(others) = count.checked_sub(1).filter(|others| *others > 0) {
                further.duration(many.saturating_sub(one) / others);
            }
            let children = children.into_iter().map(go).collect::<Result<Vec<_>, _>>()?;
            alive.duration(between(begun, monotonic_ns())?);
            if children.len() != count as usize {
                return Err(format!("{} children of {count}", children.len()).into());
            }
            parent.worker.stats()?;
        }
        all.extend([further, alive].map(|row| row.on(Axis::Children, count.into())));
    }
    Ok(all)
}
