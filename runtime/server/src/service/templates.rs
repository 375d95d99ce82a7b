//! The template of each kind of sandbox: made once however many ask for it at a time.

use super::ServiceError;
use crate::artefacts::Artefacts;
use crate::executor;
use crate::images::Image;
use crate::pool::{Mender, Pool, Source, TemplateKey};
use crate::template::maker::{Made, Maker};
use peregrine_vmm::worker::Zygote;
use peregrine_vmm::{DiskConfig, VmConfig};
use prewarm::Policy;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OnceCell;

/// How long an idle worker of a template that nobody configured is kept.
const IDLE_EXPIRY: Duration = Duration::from_secs(120);

/// What chooses a template.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shape {
    /// The root file system.
    pub image: Image,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub mem_mib: u64,
}

/// What a template is made of: image file, vCPUs, memory. An image has as many names as it is given, and one template.
pub(super) type Content = (PathBuf, u32, u64);

impl Shape {
    /// Whose template it shares.
    pub(super) fn content(&self) -> Content {
        (self.image.path.clone(), self.vcpus, self.mem_mib)
    }
}

/// A template that is there, verified.
#[derive(Debug)]
pub(super) struct Template {
    /// Its name.
    pub key: TemplateKey,
    /// What workers restore.
    pub source: Source,
}

/// All that were asked for.
#[derive(Debug)]
pub(super) struct Templates {
    artefacts: Artefacts,
    maker: Maker,
    /// Its workers restore them.
    zygote: Arc<Zygote>,
    made: RefCell<HashMap<Content, Rc<OnceCell<Rc<Template>>>>>,
}

impl Templates {
    /// None yet; `program` makes them.
    #[must_use]
    pub(super) fn new(artefacts: Artefacts, program: &Path, zygote: Arc<Zygote>) -> Self {
        let maker = Maker::new(program, &artefacts.store);
        Self { artefacts, maker, zygote, made: RefCell::default() }
    }

    /// The files that every guest starts from.
    #[must_use]
    pub(super) fn artefacts(&self) -> &Artefacts {
        &self.artefacts
    }

    /// The disks of a sandbox with this image.
    #[must_use]
    pub(super) fn disks(&self, image: &Image) -> Vec<DiskConfig> {
        let paths = [&self.artefacts.agent_disk, &image.path];
        paths.map(|path| DiskConfig { path: path.clone(), read_only: true }).to_vec()
    }

    /// The template of this shape, made now if it must be, and known to the pool.
    ///
    /// # Errors
    /// Why it cannot be made. The next one to ask tries again.
    pub(super) async fn get(&self, shape: &Shape, pool: &Pool) -> Result<Rc<Template>, ServiceError> {
        let cell = Rc::clone(self.made.borrow_mut().entry(shape.content()).or_default());
        let make = || async {
            let template = self.prepare(shape).await?;
            pool.add(Rc::clone(&template.key), template.source.clone(), on_demand()).await?;
            Ok::<_, ServiceError>(template)
        };
        cell.get_or_try_init(make).await.cloned()
    }

    /// The template of this shape, if it is there.
    pub(super) fn made(&self, shape: &Shape) -> Option<Rc<Template>> {
        self.made.borrow().get(&shape.content())?.get().cloned()
    }

    async fn prepare(&self, shape: &Shape) -> Result<Rc<Template>, ServiceError> {
        let disks = self.disks(&shape.image);
        let config = VmConfig {
            kernel: self.artefacts.kernel.clone(),
            vcpus: shape.vcpus,
            mem_mib: shape.mem_mib,
            disks: disks.clone(),
            kernel_parameters: String::new(),
            verbose: false,
            profile: None,
        };
        let (mended, maker) = (config.clone(), self.maker.clone());
        let mender = Mender::new(move || maker.mend(&mended).map(drop).map_err(|error| error.to_string()));
        let (maker, zygote) = (self.maker.clone(), Arc::clone(&self.zygote));
        let prepare = move || maker.prepare(&config).inspect(|made| zygote.learn(&made.dir));
        let Made { key, dir } = executor::blocking(prepare).await?;
        let source = Source { dir, disks, mender: Some(mender) };
        Ok(Rc::new(Template { key: key.into(), source }))
    }
}

/// Of a template that nobody configured nothing is kept before it is asked for.
pub(super) fn on_demand() -> Policy {
    Policy { low: 0, high: 16, parked: 16, idle_expiry: IDLE_EXPIRY, ..Policy::default() }
}
